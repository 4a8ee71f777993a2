"""Loader for vision encoders in Hugging Face folders: CLIP, SigLIP, DINOv2, Chinese-CLIP."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_core.errors import LlavaError, first_line
from llava_core.input_folders import require_plain_weights
from llava_core.types import JsonDict
from llava_core.vision.preprocess import CLIP_MEAN, CLIP_STD, FILTERS, Preprocess
from llava_core.vision.tower import VisionTower, encoder_record, layer_index, read_json

HUGGING_FACE = {
    "chinese_clip": "ChineseCLIPVisionModel",
    "chinese_clip_vision_model": "ChineseCLIPVisionModel",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
}
"""`model_type` in config.json -> class in transformers."""


def open_hugging_face(
    folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str
) -> VisionTower:
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in HUGGING_FACE:
        raise LlavaError(
            f"{folder} holds no vision encoder known here",
            expected=f"model_type {', '.join(k for k in HUGGING_FACE if '_model' not in k)}",
            got=kind,
        )
    require_plain_weights(folder)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights or not (folder / "preprocessor_config.json").exists():
        raise LlavaError(
            f"{folder} lacks {'preprocessor_config.json' if weights else 'weights'}",
            expected="config.json, preprocessor_config.json and *.safetensors or pytorch_model*.bin",
            do="download it again",
        )
    import transformers  # takes seconds, which a ModelScope folder does not need

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, loading = getattr(transformers, HUGGING_FACE[kind]).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # each library raises its own kinds of exception for damaged files
        raise LlavaError(f"cannot load the vision encoder in {folder}", got=first_line(error)) from None
    if loading["missing_keys"]:
        raise LlavaError(
            f"the weights in {folder} are not whole",
            got=f"no {min(loading['missing_keys'])}",
            do="download it again",
        )
    model = model.eval().requires_grad_(False).to(device, dtype)
    layer = layer_index(layer, model.config.num_hidden_layers, folder.name)
    norm = _final_norm(model)

    def layers_of(pixels: torch.Tensor, layers: Sequence[int | None]) -> list[torch.Tensor]:
        hidden = any(index is not None for index in layers)
        out = model(pixel_values=pixels, **({"output_hidden_states": True} if hidden else {}))
        return [
            norm(out.last_hidden_state) if index is None else out.hidden_states[index] for index in layers
        ]

    def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
        return layers_of(pixels, [layer])[0]

    preprocess = _preprocess(read_json(folder / "preprocessor_config.json"), decode)
    with torch.inference_mode():
        blank = torch.zeros(1, 3, preprocess.size, preprocess.size, device=device, dtype=dtype)
        _, tokens, width = tokens_of(blank).shape
    return VisionTower(
        preprocess=preprocess,
        encoder=encoder_record(folder, weights, layer, tokens, width, dtype),
        device=device,
        dtype=dtype,
        _tokens=tokens_of,
        network=model,
        _layers=layers_of,
        _blocks=model.config.num_hidden_layers,
    )


def _final_norm(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last layer norm of CLIP, which transformers applies to the class token only; else the identity."""
    inner = getattr(model, "vision_model", model)
    if type(model).__name__ not in ("CLIPVisionModel", "ChineseCLIPVisionModel"):
        return lambda tokens: tokens
    norm: Callable[[torch.Tensor], torch.Tensor] = inner.post_layernorm
    return norm


def _preprocess(config: JsonDict, decode: str) -> Preprocess:
    """Settings from preprocessor_config.json, in the old format (a number for a size) or the new one."""
    size, crop = _sides(config.get("size", 224)), _sides(config.get("crop_size", 224))
    cropped = config.get("do_center_crop", False)
    target = crop[1] if cropped else size[1]
    shorter = size[0]
    if not cropped and shorter is not None:
        raise LlavaError("an encoder that keeps the aspect ratio without a crop takes pictures of any shape",
                         expected="a fixed height and width, or do_center_crop")  # fmt: skip
    names = {member.value: name for name, member in FILTERS.items()}
    return Preprocess(
        size=target,
        mean=tuple(config.get("image_mean", CLIP_MEAN)),
        std=tuple(config.get("image_std", CLIP_STD)),
        filter=names[config.get("resample", FILTERS["bicubic"].value)],
        crop="squash" if shorter is None else f"center {shorter}",
        decode=decode,
    )


def _sides(size: Any) -> tuple[int | None, int]:
    """A preprocessor's size -> (shorter side, or None if both sides are fixed; side)."""
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        return None, size["height"]
    return size, size
