"""Loading a language model: any local folder with a causal model, a tokenizer and a chat template."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_core.cli.console import say
from llava_core.device import default_dtype, is_device_failure, is_memory_full
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import sha256_files
from llava_core.input_folders import (
    config_of,
    contents,
    require_language_model,
    require_plain_weights,
    weight_files,
)
from llava_core.language.chat_template import DATE_MACRO, TODAY, with_fixed_date
from llava_core.language.model import LanguageModel, differ

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""Download nothing and run no code of the folder; without the latter transformers would ask on stdin."""
OWN_CODE = "use the model in the format that transformers has itself (often NAME-hf), a GGUF file, or another"


@contextlib.contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Hide the progress bar for GGUF files, which transformers' own switch does not cover."""
    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


def load_language_model(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load model and tokenizer in `folder` (safetensors, bin or one .gguf), frozen and in eval mode.

    Raises LlavaError if weights or chat template are missing, or transformers cannot load the folder.
    """
    device = torch.device(device)
    _require_causal(folder)
    weights = weight_files(folder)
    where = {"gguf_file": weights[0].name} if weights[0].suffix == ".gguf" else {}
    try:
        with warnings.catch_warnings(), no_gguf_bar():
            warnings.simplefilter("ignore")
            tokenizer = _tokenizer(folder, where)
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, **LOCAL, **where
            )
    except ImportError as error:
        raise LlavaError(
            f"cannot load {weights[0]}", got=first_line(error), do="pip install 'llava-align[gguf]'"
        ) from None
    except Exception as error:  # each library raises its own kinds of exception for damaged files
        raise LlavaError(
            f"cannot load the language model in {folder}",
            expected="a causal model and tokenizer that transformers loads",
            got=first_line(error),
            do=OWN_CODE if "trust_remote_code" in str(error) else None,
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise LlavaError(
            f"the weights in {folder} are not whole",
            got=f"no {missing[0]}" + (f" and {len(missing) - 1} others" if missing[1:] else ""),
            do="download it again",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise LlavaError(
            f"the tokenizer in {folder} has no chat template",
            do="use an instruct model, or add chat_template.jinja to the folder",
        )
    model = model.to(device).eval().requires_grad_(False)
    # Parameters, not buffers: rotary frequencies rounded to bf16 give wrong angles.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or default_dtype(device))
    embedding, scale = model.get_input_embeddings().weight, _embedding_scale(model)
    llm = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        id=folder.resolve().name,
        weights_sha256=sha256_files(weights),
        embedding_rms=scale * float(embedding.float().pow(2).mean().sqrt()),
        eos_ids=_end_tokens(folder, model, tokenizer),
        embedding_scale=scale,
    )
    _require_embeddings_alone(llm)
    return llm


def outline_language_model(folder: Path) -> LanguageModel:
    """The model in `folder` on the meta device: shapes and tokenizer without weights.

    Raises LlavaError if transformers knows no such model or tokenizer.
    """
    _require_causal(folder)
    gguf = sorted(folder.glob("*.gguf"))
    where = {"gguf_file": gguf[0].name} if gguf and not (folder / "config.json").exists() else {}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            tokenizer = _tokenizer(folder, where)
            config = AutoConfig.from_pretrained(folder, **LOCAL, **where)
            model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    except Exception as error:  # as above
        raise LlavaError(
            f"cannot read the language model's shape in {folder}",
            expected="config.json and tokenizer of a causal model that transformers loads",
            got=first_line(error),
        ) from None
    eos_ids, scale = _end_tokens(folder, model, tokenizer), _embedding_scale(model)
    return LanguageModel(model, tokenizer, folder.resolve().name, None, math.nan, eos_ids, scale)


def _tokenizer(folder: Path, where: dict[str, str]) -> Any:
    """The tokenizer in `folder`, with a fixed date in its chat template, and a message if that changes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL, **where)
    template: Any = getattr(tokenizer, "chat_template", None)
    if "strftime_now(" in str(template) and DATE_MACRO not in str(template):
        say(f"the chat template in {folder} writes today's date, which is always {TODAY:%d %B %Y} here")
        if isinstance(template, dict):  # several of them, by their names
            template = {name: with_fixed_date(text) for name, text in template.items()}
        else:
            template = with_fixed_date(template)
        tokenizer.chat_template = template
    return tokenizer


def _require_causal(folder: Path) -> None:
    """Raise LlavaError if the folder is missing or holds no causal language model that transformers has."""
    require_language_model(folder)
    _require_readable(folder / "generation_config.json")
    if any(folder.glob("*.gguf")):
        return
    config = config_of(folder)
    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
            raise LlavaError(
                f"the model in {folder} needs code of its own, which is not run",
                expected="a model that transformers has itself",
                got=f"model_type {kind} with auto_map",
                do=OWN_CODE,
            )
        raise LlavaError(
            f"{folder} holds no language model",
            expected="config.json of a causal model that transformers knows, or *.gguf",
            got=f"model_type {kind}" if kind else contents(folder),
            do="give --llm the folder of one, or download it again",
        )
    require_plain_weights(folder)


def _require_readable(path: Path) -> None:
    """Raise LlavaError for a damaged JSON file, which transformers would silently replace by defaults."""
    try:
        if path.exists() and not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("no object in braces")
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"damaged {path}", got=first_line(error), do="download it again") from None


def _embedding_scale(model: Any) -> float:
    """Factor of transformers' ScaledWordEmbedding classes, rounded so that bf16 and fp32 agree; else 1."""
    layer = model.get_input_embeddings()
    scale = getattr(layer, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor) and scale.is_meta:
        scale = layer.weight.shape[1] ** 0.5
    return round(float(scale), 4)


def _require_embeddings_alone(llm: LanguageModel) -> None:
    """Raise LlavaError if logits for token ids differ from those for the embeddings that `embed` gives.

    Gemma 3n and others add per-layer embeddings of token ids, which visual tokens do not have.
    """
    ids = torch.arange(2, device=llm.device)[None]
    try:
        with torch.inference_mode():
            embedded = llm.embed(ids)
            logits = llm.model(inputs_embeds=embedded, use_cache=False).logits
            different = differ(logits, llm.model(input_ids=ids, use_cache=False).logits)
            llm.model(inputs_embeds=embedded.mean(1, keepdim=True), use_cache=False)  # of no token
        got = "other logits for embeddings" if different else ""
    except Exception as error:  # each model rejects embeddings in its own way
        if is_memory_full(error) or is_device_failure(error):
            raise
        got = first_line(error)
    if got:
        raise LlavaError(
            f"a {type(llm.model).__name__} cannot read visual tokens",
            expected="a model that reads embeddings as it reads the tokens they are of",
            got=got,
            do="use another language model",
        )


def _end_tokens(folder: Path, model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids of the end tokens; prints those outside the vocabulary. Raises LlavaError for anything but ids."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    numbers: list[Any] = [
        *(configured if isinstance(configured, list) else [configured]),
        tokenizer.eos_token_id,
    ]
    numbers = [number for number in numbers if number is not None]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if odd := [number for number in numbers if type(number) is not int]:
        raise LlavaError(
            f"eos_token_id in generation_config.json or config.json of {folder}",
            expected="the number of a token, or a list of them",
            got=repr(odd[0]),
            do="write there what the model's publisher has",
        )
    if beyond := [number for number in numbers if not 0 <= number < vocabulary]:
        say(f"{folder}: eos_token_id {beyond[0]} ends no answer: there are {vocabulary:,} tokens, from 0 on")
    return frozenset(number for number in numbers if 0 <= number < vocabulary)
