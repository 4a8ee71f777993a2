"""A vision encoder, a projector and a language model as one model of transformers (4.53 to 5).

This file lies in every folder that `llava export` writes, and needs transformers and torch alone. What the
language model sees is `[visual tokens][chat-template text]`. LlavaForConditionalGeneration cannot do that: it
takes hidden states from before the encoder's last layer norm, and knows no pooled tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import operator
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)

NORM_LEFT_OUT = ("clip_vision_model", "chinese_clip_vision_model")
"""Encoders whose last layer norm transformers applies to the class token only."""


class LlavaAlignConfig(PretrainedConfig):  # type: ignore[misc]
    """The encoder's and the language model's own configurations, and what lies between them."""

    model_type = "llava_align"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        projector: dict[str, Any] | None = None,
        layer: int | None = None,
        image_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        """`layer`: that entry of the encoder's hidden_states, by default all tokens after its last norm."""
        self.vision_config, self.text_config = _config(vision_config), _config(text_config)
        self.projector, self.layer, self.image_token_id = projector or {}, layer, image_token_id
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


def _config(settings: Any) -> Any:
    return AutoConfig.for_model(**settings) if isinstance(settings, dict) else settings


class LlavaAlignForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    config_class = LlavaAlignConfig
    _supports_cache_class = _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = True
    _supports_attention_backend = supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ("projector",)
    _no_split_modules = ("CLIPEncoderLayer", "ChineseCLIPVisionLayer", "SiglipEncoderLayer", "Dinov2Layer")

    def __init__(self, config: LlavaAlignConfig) -> None:
        super().__init__(config)
        vision = AutoModel.from_config(config.vision_config)
        self.vision = getattr(vision, "vision_model", vision)  # transformers 4 has a shell around it
        self.projector = _projector(**config.projector)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises OSError first if a file of a local folder is not what SHA256SUMS says."""
        sums = Path(pretrained_model_name_or_path) / "SHA256SUMS"
        for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else ():
            wanted, _, name = line.partition("  ")
            with (sums.parent / name).open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != wanted:
                do = f"copy it again; if you changed it yourself, delete {sums}"
                raise OSError(f"{sums.parent / name} is not the file that was exported: {do}")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, S, S] -> visual tokens [B, T, hidden]."""
        pixels = pixel_values.to(next(self.vision.parameters()))
        if self.config.layer is not None:
            features = self.vision(pixels, output_hidden_states=True).hidden_states[self.config.layer]
        else:
            features = self.vision(pixels).last_hidden_state
            if self.config.vision_config.model_type in NORM_LEFT_OUT:
                features = self.vision.post_layernorm(features)
        # Through fp16, as the features that the projector was trained on.
        projector = self.config.projector
        arguments = projector.get("visual_tokens_arguments", {})
        chosen = _choose(features.half(), projector["visual_tokens"], arguments)
        visual: torch.Tensor = self.projector(chosen.to(next(self.projector.parameters())))
        return visual

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the language model's own, with a picture for each row in place of its first image tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and not (past_key_values and past_key_values.get_seq_length()):
                visual = self.get_image_features(pixel_values).to(inputs_embeds)
                places = input_ids == self.config.image_token_id
                # Padding may be the same token.
                if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == places.shape:
                    places &= attention_mask.to(places)
                places &= places.cumsum(-1) <= visual.shape[1]
                if places.sum() != visual.shape[0] * visual.shape[1]:
                    raise ValueError(f"expected {visual.shape[1]} image tokens before the text of each row")
                inputs_embeds = inputs_embeds.masked_scatter(places[..., None], visual)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def _projector(
    kind: str,
    in_width: int,
    out_width: int,
    visual_tokens: str,
    visual_tokens_arguments: dict[str, Any] | None = None,
    feature_norm: str = "none",
    **arguments: Any,
) -> nn.Module:
    wide = in_width
    if ":" in visual_tokens:
        wide *= _class(visual_tokens)(**(visual_tokens_arguments or {})).widening
    if visual_tokens.startswith("shuffle"):
        wide = in_width * _factor(visual_tokens) ** 2
    numbers = [int(number) for number in re.findall(r"\d+", kind)]
    module: nn.Module
    if ":" in kind:
        module = _class(kind)(wide, out_width, **arguments)
    elif kind == "linear":
        module = nn.Linear(wide, out_width)
    elif kind.startswith("lowrank"):
        rank = numbers[0] if numbers else arguments.get("rank", 64)
        module = nn.Sequential(nn.Linear(wide, rank, bias=False), nn.Linear(rank, out_width))
    else:
        module = _mlp(wide, out_width, *numbers, **arguments)
    if feature_norm == "none":
        return module
    norm = nn.LayerNorm(wide) if feature_norm == "layer" else _Center(wide)
    return nn.Sequential(OrderedDict(feature_norm=norm, map=module))


def _mlp(in_width: int, out_width: int, depth: int = 2, width: int | None = None) -> nn.Module:
    widths = [in_width, *[width or out_width] * (depth - 1), out_width]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.GELU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])


class _Center(nn.Module):
    """Features less their mean in training."""

    mean: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features - self.mean


def _class(reference: str) -> Any:
    """What `module:Class` names. Raises ModuleNotFoundError if the package that has it is not installed."""
    module, _, name = reference.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def _factor(visual_tokens: str) -> int:
    """Patches along each side of a block: 4 of pool4, 2 of pool."""
    return int(visual_tokens.removeprefix("pool").removeprefix("shuffle") or 2)


def _choose(features: torch.Tensor, visual_tokens: str, arguments: dict[str, Any]) -> torch.Tensor:
    """Tokens [B, T, D] -> all, the patches without CLS, or of each block of them the mean, or all in one."""
    if visual_tokens == "all":
        return features
    if ":" in visual_tokens:
        chosen: torch.Tensor = _class(visual_tokens)(**arguments)(features)
        return chosen
    batch, tokens, width = features.shape
    side = math.isqrt(tokens)
    patches = features[:, -side * side :]
    if visual_tokens == "patches":
        return patches
    n = _factor(visual_tokens)
    grid = patches.reshape(batch, side // n, n, side // n, n, width).transpose(2, 3)
    blocks = grid.reshape(batch, (side // n) ** 2, n * n, width)
    return blocks.flatten(2) if visual_tokens.startswith("shuffle") else blocks.float().mean(2)
