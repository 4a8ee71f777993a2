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
from llava_core.vision.chinese_clip import CONTEXT, PAD
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
TWO_TOWERS: dict[str, tuple[str, int | None, int]] = {
    "chinese_clip": ("ChineseCLIPModel", PAD, CONTEXT),
    "clip": ("CLIPModel", None, 77),
}
"""The same -> class with a text tower whose image embedding is of the class token; its padding, as for
HuggingFaceTowers; most tokens of a text."""


def open_hugging_face(
    folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str, text: bool = False
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
    model = _loaded(folder, HUGGING_FACE[kind]).to(device, dtype)
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

    clip = tokenizer = None
    if text and kind in TWO_TOWERS:
        own, pad, context = TWO_TOWERS[kind]
        clip = HuggingFaceTowers(
            _loaded(folder, own).to(device, dtype), lambda pixels: layers_of(pixels, [None])[0], pad
        )
        tokenizer = HuggingFaceTokenizer(folder, context)
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
        _clip=clip,
        _tokenizer=tokenizer,
    )


def _loaded(folder: Path, name: str) -> Any:
    """A model of transformers in eval mode, without gradients. Raises LlavaError for damaged weights."""
    import transformers  # takes seconds, which a ModelScope folder does not need

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, loading = getattr(transformers, name).from_pretrained(
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
    return model.eval().requires_grad_(False)


class HuggingFaceTowers:
    """CLIP or Chinese-CLIP of transformers, as `tower.TwoTowers`."""

    def __init__(
        self, model: Any, tokens_of: Callable[[torch.Tensor], torch.Tensor], pad: int | None
    ) -> None:
        """`tokens_of` gives all tokens after the final norm; `pad` is an id to mask, if texts are read both
        ways, and else None."""
        self.text, self.tokens_of, self.pad = model.text_model, tokens_of, pad
        self.text_projection, self.visual_projection = model.text_projection, model.visual_projection

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(self.tokens_of(pixels))

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.visual_projection(tokens[:, 0])
        return embedded

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        mask = None if self.pad is None else ids.ne(self.pad).long()
        out = self.text(input_ids=ids, attention_mask=mask)
        embedded: torch.Tensor = self.text_projection(
            out.pooler_output if self.pad is None else out.last_hidden_state[:, 0]
        )
        return embedded


class HuggingFaceTokenizer:
    """The tokenizer in a folder, as `tower.TextTokenizer`. Raises LlavaError if there is none."""

    def __init__(self, folder: Path, context: int) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            what = f"cannot load the text tower's tokenizer in {folder}"
            raise LlavaError(what, got=first_line(error), do="download it again") from None
        self.context = context

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": self.context}
        ids: torch.Tensor = self.tokenizer(list(texts), return_tensors="pt", **options).input_ids
        return ids

    def length(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)


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
        raise LlavaError("an encoder that keeps the aspect ratio without a crop takes images of any shape",
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
