"""The frozen language model: any local folder with a causal model and a chat template."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from llava_core.console import say
from llava_core.conversation import TODAY, with_fixed_date
from llava_core.device import default_dtype
from llava_core.errors import LlavaError, first_line
from llava_core.fingerprint import JsonDict, sha256_files
from llava_core.folders import config_of, contents
from llava_core.identity import LanguageModelIdentity

logging.disable_progress_bar()

SETTINGS = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation"),
    *("rms_norm_eps", "layer_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"),
    *("sliding_window", "rope_theta", "rope_type", "factor", "partial_rotary_factor"),
)
"""Of config.json: what no shape of a weight shows."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode whose weights take no gradients."""

    model: Any
    """The transformers model; `.model` in it is the stack of blocks, without the vocabulary head."""
    tokenizer: Any
    id: str
    """Name of its folder."""
    weights_sha256: str | None
    """None of an outline."""
    embedding_rms: float
    """Root mean square of one number of the text embeddings: the scale projected tokens start at."""
    eos_ids: frozenset[int]
    """Tokens that end an answer."""
    embedding_scale: float = 1.0
    """What the embeddings of the table are multiplied by before the first block."""

    @functools.cached_property
    def identity(self) -> LanguageModelIdentity:
        """What a projector checkpoint remembers of it."""
        return LanguageModelIdentity.of_tokenizer(
            self.tokenizer,
            self.eos_ids,
            id=self.id,
            weights_sha256=self.weights_sha256,
            hidden=self.hidden,
            architecture=type(self.model).__name__,
            settings=_settings(self.model.config),
            embedding_scale=self.embedding_scale,
        )

    @property
    def hidden(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> torch.nn.Embedding:
        layer: torch.nn.Embedding = self.model.get_input_embeddings()
        return layer

    @property
    def head(self) -> torch.Tensor:
        """Weight of the vocabulary head, [vocabulary, hidden]."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def context(self) -> int:
        """Most positions it reads, visual tokens among them."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)

    def require_context(self, what: str, tokens: int, do: str) -> None:
        """Raise LlavaError if `what` has more tokens than the context."""
        if tokens > self.context:
            raise LlavaError(
                f"{what} does not fit the language model's context",
                expected=f"at most {self.context:,} tokens",
                got=f"{tokens:,}",
                do=do,
            )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> embeddings [..., hidden]."""
        embedded: torch.Tensor = self.embedding(ids)
        return embedded


@contextlib.contextmanager
def no_gguf_bar() -> Iterator[None]:
    """Without the bar of GGUF files, which alone is no part of transformers' own switch for bars."""
    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


def load_language_model(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load the model and tokenizer in `folder` (safetensors, bin or one .gguf), freeze them, set eval mode.

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
                folder, local_files_only=True, output_loading_info=True, **where
            )
    except ImportError as error:
        raise LlavaError(
            f"cannot load {weights[0]}", got=first_line(error), do="pip install 'llava-align[gguf]'"
        ) from None
    except LlavaError:
        raise
    except Exception as error:  # a damaged file makes each library raise kinds of its own
        raise LlavaError(
            f"cannot load the language model in {folder}",
            expected="a causal model and tokenizer that transformers loads",
            got=first_line(error),
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
    # Not the buffers: rotary frequencies rounded to bf16 turn by wrong angles.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or default_dtype(device))
    embedding = model.get_input_embeddings().weight
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        id=folder.resolve().name,
        weights_sha256=sha256_files(weights),
        embedding_rms=float(embedding.float().pow(2).mean().sqrt()),
        eos_ids=_end_tokens(model, tokenizer),
    )


def outline_language_model(folder: Path) -> LanguageModel:
    """The model in `folder` on the meta device: sizes and tokenizer, no weights and nothing of their values.

    Raises LlavaError if transformers knows no such model or tokenizer.
    """
    _require_causal(folder)
    gguf = sorted(folder.glob("*.gguf"))
    where = {"gguf_file": gguf[0].name} if gguf and not (folder / "config.json").exists() else {}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            tokenizer = _tokenizer(folder, where)
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **where)
            model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    except LlavaError:
        raise
    except Exception as error:  # as above
        raise LlavaError(
            f"cannot read the language model's shape in {folder}",
            expected="config.json and tokenizer of a causal model that transformers loads",
            got=first_line(error),
        ) from None
    return LanguageModel(
        model, tokenizer, folder.resolve().name, None, math.nan, _end_tokens(model, tokenizer)
    )


def _tokenizer(folder: Path, where: dict[str, str]) -> Any:
    """The tokenizer in `folder`, with a chat template that is the same every day."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **where)
    template: Any = getattr(tokenizer, "chat_template", None)
    if "strftime_now(" in str(template):
        say(f"the chat template in {folder} writes today's date, which is always {TODAY:%d %B %Y} here")
        if isinstance(template, dict):  # several of them, by their names
            template = {name: with_fixed_date(text) for name, text in template.items()}
        else:
            template = with_fixed_date(template)
        tokenizer.chat_template = template
    return tokenizer


def _require_causal(folder: Path) -> None:
    """Raise LlavaError for a folder that is not there, or holds a model of another kind, or none."""
    if not folder.is_dir():
        do = "give --llm a folder; README.md shows how to download one"
        raise LlavaError(f"no language model folder {folder}", do=do)
    if any(folder.glob("*.gguf")):
        return
    config = config_of(folder)
    kind = config.get("model_type")
    own_code = config.get("auto_map") or {}
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in own_code:
        raise LlavaError(
            f"{folder} holds no language model",
            expected="config.json of a causal model that transformers knows, or *.gguf",
            got=f"model_type {kind}" if kind else contents(folder),
            do="give --llm the folder of one, or download it again",
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: every shard of the first format present."""
    for pattern in ("*.safetensors", "pytorch_model*.bin", "*.gguf"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise LlavaError(
        f"no weights in {folder}",
        expected="*.safetensors, pytorch_model*.bin or *.gguf",
        do="download it again",
    )


def _settings(config: Any) -> JsonDict:
    """Those of SETTINGS that the configuration has."""
    text = config.get_text_config()
    # transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters.
    rope = {**(getattr(text, "rope_scaling", None) or {}), **(getattr(text, "rope_parameters", None) or {})}
    every = {**text.to_dict(), **rope}
    return {key: every[key] for key in SETTINGS if every.get(key) is not None}


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
