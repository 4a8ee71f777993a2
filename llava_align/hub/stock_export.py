"""`llava export --to llava`: transformers' own LlavaForConditionalGeneration, which vLLM and others run, too.

It takes the tokens of one of the encoder's hidden states, which are those before its last norm, all or
without the first one, and maps them with two linear layers. What a projector was trained for beyond that is
refused by name.
"""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from llava_align.hub import export
from llava_align.hub.config import ExportConfig
from llava_align.hub.export_folder import copy_licences, new_folder, require_space
from llava_align.hub.linear_layers import TRANSFORMERS, linear_layers
from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.language.model import LanguageModel
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import Projector
from llava_core.sha256sums import write_sums
from llava_core.types import JsonDict
from llava_core.vision.open import open_trained_tower
from llava_core.vision.preprocess import FILTERS, Preprocess
from llava_core.vision.tower import VisionTower

IMAGE_TOKEN = "<image>"
TEMPLATE = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}
{%- set plain = namespace(messages=[], images=0) -%}
{%- for message in messages -%}
    {%- set text = message.content -%}
    {%- if text is not string -%}
        {%- set images = text | rejectattr('type', 'equalto', 'text') | list -%}
        {%- set plain.images = plain.images + (images | length) -%}
        {%- set text = text | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
    {%- endif -%}
    {%- set plain.messages = plain.messages + [dict(message, content=text)] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
{{- '<image>' * plain.images -}}
"""
"""What stands before the language model's own template: the picture comes before all text."""


def run(config: ExportConfig) -> JsonDict:
    """Write the folder.

    Raises LlavaError for what the class cannot compute, or if the disk is too small.
    """
    checkpoint = load_checkpoint(config.checkpoint)
    projector = checkpoint.projector
    tower = open_trained_tower(config.vision, checkpoint.provenance)
    llm = load_its_language_model(checkpoint, config.llm)
    require_plain(llm)
    strategy, extra = selected(tower, projector)
    tokenizer = with_image_token(llm)
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    weights = all_weights(tower, projector, llm, token + 1, getattr(torch, config.dtype))
    vision, text = export.model_settings(config, tower, llm)
    text["vocab_size"] = max(token + 1, len(llm.embedding.weight))
    size = sum(tensor.nbytes for tensor in weights.values())
    require_space(config.out, size, config.dtype, config.dry_run)
    summary: JsonDict = {"out": str(config.out), "bytes": size, "dtype": config.dtype}
    if config.dry_run:
        return summary
    settings = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": token,
        "image_seq_length": projector.tokens_out(tower.tokens),
        "projector_hidden_act": "gelu" if len(linear_layers(projector)) == 2 else "linear",
        "vision_feature_layer": tower.encoder["layer"],
        "vision_feature_select_strategy": strategy,
        "torch_dtype": config.dtype,
        "tie_word_embeddings": llm.head is llm.embedding.weight,
        "vision_config": vision,
        "text_config": text,
    }
    generation = export.generation_settings(llm)
    if token >= len(llm.embedding.weight):
        generation["suppress_tokens"] = [token]  # its logit is 0, which others may be below
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": extra,
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": strategy,
    }
    with new_folder(config.out) as partial:
        save_torch_state_dict(weights, partial, metadata={"format": "pt"})
        export.write_tokenizer(tokenizer, partial, partial)
        for name, content in (
            ("config", settings),
            ("generation_config", generation),
            ("processor_config", processor),
            ("preprocessor_config", image_settings(tower.preprocess)),
        ):
            export.write_json(partial / f"{name}.json", content)
        for path in partial.glob("*.safetensors"):  # which are created with mode 600
            shutil.copymode(partial / "config.json", path)
        licences = copy_licences({"vision": config.vision, "llm": config.llm}, partial)
        write_sums(partial, {path.name: sha256_files([path]) for path in partial.iterdir()})
        readme = export.card(checkpoint, config.dtype, licences, "stock_card.md")
        (partial / "README.md").write_text(readme, encoding="utf-8")
    return summary


@torch.inference_mode()
def require_plain(llm: LanguageModel) -> None:
    """Raise LlavaError unless the class, blocks and one matrix, computes the logits of this model."""
    embedded = llm.embed(torch.arange(8, device=llm.device)[None])
    logits = llm.model(inputs_embeds=embedded).logits
    hidden = llm.model.base_model(inputs_embeds=embedded).last_hidden_state
    plain = torch.allclose(torch.nn.functional.linear(hidden, llm.head), logits, rtol=1e-3, atol=1e-3)
    if not plain or any(not name.startswith(("model.", "lm_head.w")) for name in llm.model.state_dict()):
        raise LlavaError(
            "LlavaForConditionalGeneration takes a language model of blocks and a vocabulary matrix",
            expected="weights named model.* and lm_head.weight, and logits without bias, scale or cap",
            got=llm.identity.architecture,
            do=TRANSFORMERS,
        )


def with_image_token(llm: LanguageModel) -> Any:
    """A copy of the tokenizer that knows IMAGE_TOKEN, and puts it before all text."""
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = TEMPLATE + tokenizer.chat_template
    names = ["input_ids", "attention_mask"]  # the class takes no others
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def all_weights(
    tower: VisionTower, projector: Projector, llm: LanguageModel, rows: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights by the names of llava-hf; the vocabulary has at least `rows`. The projector stays float32."""
    named = getattr(getattr(tower.network, "config", None), "model_type", "")
    shell = "" if named.startswith("dinov2") else "vision_model."
    weights = {
        f"vision_tower.{shell}{name}": tensor for name, tensor in export.vision_weights(tower.network).items()
    }
    embedding = llm.embedding.weight
    for name, tensor in export.language_weights(llm).items():
        if name == "lm_head.weight" or tensor.data_ptr() == embedding.data_ptr():
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, max(0, rows - len(tensor))))
        weights[f"language_model.{name}"] = tensor
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    for name, tensor in two_layers(projector).items():
        weights[f"multi_modal_projector.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def selected(tower: VisionTower, projector: Projector) -> tuple[str, int]:
    """vision_feature_select_strategy, and how many tokens the encoder has besides its patches."""
    tokens = projector.config["visual_tokens"]
    if tower.encoder["layer"] is None:
        raise LlavaError(
            "LlavaForConditionalGeneration takes features from before the encoder's last norm",
            expected="a projector trained on a layer before it (extract run --layer -2)",
            got="features after it",
            do=TRANSFORMERS,
        )
    extra = tower.tokens - math.isqrt(tower.tokens) ** 2
    strategies = {"all": "full", "patches": "default" if extra else "full"}
    if tokens not in strategies or (tokens == "patches" and extra > 1):
        raise LlavaError(
            "LlavaForConditionalGeneration takes all tokens of the encoder, or all but the first",
            expected="a projector trained with --visual-tokens all or patches",
            got=tokens,
            do=TRANSFORMERS,
        )
    return strategies[tokens], extra


def two_layers(projector: Projector) -> dict[str, torch.Tensor]:
    """Weights of linear_1 and linear_2 that compute what the projector does; the second may be I."""
    layers, width = linear_layers(projector), projector.config["out_width"]
    if projector.config.get("feature_norm") == "layer" or len(layers[0][1]) != width:
        got = "--feature-norm layer" if len(layers[0][1]) == width else projector.config["kind"]
        raise LlavaError(
            "LlavaForConditionalGeneration has two linear layers as wide as the language model",
            expected="a projector linear, lowrank or mlp",
            got=got,
            do=TRANSFORMERS,
        )
    layers = [*layers, (torch.eye(width), torch.zeros(width))][:2]
    return {
        f"linear_{number}.{kind}": part.float()
        for number, pair in enumerate(layers, start=1)
        for kind, part in zip(("weight", "bias"), pair, strict=True)
    }


def image_settings(preprocess: Preprocess) -> JsonDict:
    """preprocessor_config.json; transformers decodes in full, and its sizes may differ by a pixel."""
    side = {"height": preprocess.size, "width": preprocess.size}
    settings: JsonDict = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
        "resample": int(FILTERS[preprocess.filter]),
        "do_center_crop": preprocess.crop.startswith("center"),
        "crop_size": side,
        "size": side,
    }
    if preprocess.crop == "pad":
        return {**settings, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    if preprocess.crop != "squash":
        settings["size"] = {"shortest_edge": int(preprocess.crop.split()[1])}
    return settings
