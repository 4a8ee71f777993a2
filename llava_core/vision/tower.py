"""The frozen vision encoder: a local folder to tokens [B, T, D].

Two layouts are opened: ModelScope's Chinese-CLIP as published, and Hugging Face folders of encoders with
patch tokens. The language side never imports this module.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llava_core.device import default_dtype
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import sha256_files
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import MODELSCOPE_FILES, require_plain_weights, require_vision_encoder
from llava_core.types import JsonDict
from llava_core.vision.chinese_clip import ChineseClip, TextTokenizer
from llava_core.vision.preprocess import FILTERS, Preprocess

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

TEXT_WEIGHTS = ("bert.", "text_projection", "logit_scale")
"""Beginnings of the names of Chinese-CLIP's weights that images do without."""

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


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """A vision encoder in eval mode whose weights take no gradients."""

    preprocess: Preprocess
    encoder: JsonDict
    """model_id, weights_sha256, layer, tokens, width, dtype: what a shard records of it."""
    device: torch.device
    dtype: torch.dtype
    _tokens: Callable[[torch.Tensor], torch.Tensor]
    """Normalised pixels [B, 3, S, S] -> [B, T, D]."""
    network: torch.nn.Module
    """What computes them: a ChineseClip, or a vision model of transformers."""
    _clip: ChineseClip | None = None
    _tokenizer: TextTokenizer | None = None

    @property
    def tokens(self) -> int:
        return int(self.encoder["tokens"])

    @property
    def width(self) -> int:
        return int(self.encoder["width"])

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(self.encoder, self.preprocess.to_json())

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 [B, S, S, 3] as `preprocess.decode_image` gives them -> fp32 features [B, T, D]."""
        moved = torch.as_tensor(pixels).to(self.device, non_blocking=True)
        return self._tokens(self.preprocess.normalise(moved).to(self.dtype)).float()

    @torch.inference_mode()
    def encode_image_embedding(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 [B, S, S, 3] -> L2-normalised image embeddings [B, P] in the space of `encode_text`."""
        clip, _ = self._both_towers()
        moved = self.preprocess.normalise(torch.as_tensor(pixels).to(self.device)).to(self.dtype)
        return F.normalize(clip.encode_image(moved).float(), dim=-1)

    @torch.inference_mode()
    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, T, D] as `encode` gives them after the last layer norm -> embeddings as above."""
        clip, _ = self._both_towers()
        return F.normalize(clip.embed_tokens(features.to(self.device, self.dtype)).float(), dim=-1)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> L2-normalised embeddings [texts, P]; of a text the first 50 tokens."""
        clip, tokenizer = self._both_towers()
        return F.normalize(clip.encode_text(tokenizer(texts).to(self.device)).float(), dim=-1)

    def cuts(self, text: str) -> bool:
        """Whether `encode_text` reads only the first tokens of it."""
        return self._both_towers()[1].cuts(text)

    def _both_towers(self) -> tuple[ChineseClip, TextTokenizer]:
        if self._clip is None or self._tokenizer is None:
            raise LlavaError(
                f"{self.encoder['model_id']} has no text tower here",
                expected="a Chinese-CLIP folder from ModelScope, opened with its text tower",
            )
        return self._clip, self._tokenizer


def open_vision_tower(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    layer: int | None = None,
    decode: str = "draft",
    text: bool = False,
) -> VisionTower:
    """Load the encoder in `folder`, frozen, bf16 on a GPU unless `dtype` says otherwise.

    `layer` takes that entry of transformers' `hidden_states` (0 the input of the first block, -1 the output
    of the last, -2 LLaVA's choice) instead of all tokens after the final layer norm. With `text`,
    Chinese-CLIP's text tower is loaded as well.

    Raises LlavaError if a file is missing or damaged, or the encoder is of no kind known here.
    """
    device = torch.device(device)
    dtype = dtype or default_dtype(device)
    require_vision_encoder(folder)
    if (folder / MODELSCOPE_FILES[0]).exists():
        return _open_modelscope(folder, device, dtype, layer, decode, text)
    return _open_hugging_face(folder, device, dtype, layer, decode)


def _open_modelscope(
    folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str, text: bool
) -> VisionTower:
    vision, text_config = (_json(folder / name) for name in MODELSCOPE_FILES[:2])
    weights = folder / "pytorch_model.bin"
    try:
        clip = ChineseClip(vision, text_config if text else None)
        state = _plain_names(torch.load(weights, map_location="cpu", weights_only=True))
        if not text:
            state = {name: value for name, value in state.items() if not name.startswith(TEXT_WEIGHTS)}
        clip.load_state_dict(state)
    except KeyError as error:
        raise LlavaError(f"a configuration in {folder} lacks {error}", do="download it again") from None
    except Exception as error:  # torch.load and load_state_dict raise many kinds for a damaged file
        raise LlavaError(
            f"cannot load {weights}",
            expected="Chinese-CLIP's weights",
            got=first_line(error),
            do="download it again",
        ) from None
    clip = clip.float().eval().requires_grad_(False).to(device, dtype)
    blocks = vision["vision_layers"]
    layer = _layer_index(layer, blocks)
    tokens = (vision["image_resolution"] // vision["vision_patch_size"]) ** 2 + 1
    return VisionTower(
        preprocess=Preprocess(vision["image_resolution"], CLIP_MEAN, CLIP_STD, decode=decode),
        encoder=_identity(folder, [weights], layer, tokens, vision["vision_width"], dtype),
        device=device,
        dtype=dtype,
        _tokens=lambda pixels: clip.visual(pixels, layer),
        network=clip,
        _clip=clip,
        _tokenizer=TextTokenizer(folder / "vocab.txt") if text else None,
    )


def _plain_names(loaded: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights by their plain names: out of `state_dict`, without prefixes, without BERT's pooler."""
    state = loaded.get("state_dict", loaded)
    plain = {name.removeprefix("module.").removeprefix("clip_model."): value for name, value in state.items()}
    unused = ("bert.pooler.", "bert.embeddings.position_ids")
    return {name: value for name, value in plain.items() if not name.startswith(unused)}


def _open_hugging_face(
    folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str
) -> VisionTower:
    kind = _json(folder / "config.json").get("model_type")
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
    import transformers  # seconds that Chinese-CLIP's own folder does without

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, loading = getattr(transformers, HUGGING_FACE[kind]).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # a damaged file makes each library raise kinds of its own
        raise LlavaError(f"cannot load the vision encoder in {folder}", got=first_line(error)) from None
    if loading["missing_keys"]:
        raise LlavaError(
            f"the weights in {folder} are not whole",
            got=f"no {min(loading['missing_keys'])}",
            do="download it again",
        )
    model = model.eval().requires_grad_(False).to(device, dtype)
    layer = _layer_index(layer, model.config.num_hidden_layers)
    norm = _final_norm(model)

    def tokens_of(pixels: torch.Tensor) -> torch.Tensor:
        if layer is not None:
            hidden: torch.Tensor = model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
            return hidden
        last: torch.Tensor = model(pixel_values=pixels).last_hidden_state
        return norm(last)

    preprocess = _preprocess(_json(folder / "preprocessor_config.json"), decode)
    with torch.inference_mode():
        blank = torch.zeros(1, 3, preprocess.size, preprocess.size, device=device, dtype=dtype)
        _, tokens, width = tokens_of(blank).shape
    return VisionTower(
        preprocess=preprocess,
        encoder=_identity(folder, weights, layer, tokens, width, dtype),
        device=device,
        dtype=dtype,
        _tokens=tokens_of,
        network=model,
    )


def _final_norm(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """CLIP's last layer norm, which transformers applies to the class token only; others apply their own."""
    inner = getattr(model, "vision_model", model)
    if type(model).__name__ not in ("CLIPVisionModel", "ChineseCLIPVisionModel"):
        return lambda tokens: tokens
    norm: Callable[[torch.Tensor], torch.Tensor] = inner.post_layernorm
    return norm


def _preprocess(config: JsonDict, decode: str) -> Preprocess:
    """From preprocessor_config.json, in the old forms (a number for a size) and the new ones."""
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
    """A preprocessor's size -> (shorter side if only that is fixed, side)."""
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
        return None, size["height"]
    return size, size


def _identity(
    folder: Path, weights: Sequence[Path], layer: int | None, tokens: int, width: int, dtype: torch.dtype
) -> JsonDict:
    return {
        "model_id": folder.resolve().name,
        "weights_sha256": sha256_files(weights),
        "layer": layer,
        "tokens": tokens,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _layer_index(layer: int | None, blocks: int) -> int | None:
    """`layer` counted from the front, so that one layer has one name."""
    if layer is None:
        return None
    if not -blocks - 1 <= layer <= blocks:
        raise LlavaError("--layer", expected=f"{-blocks - 1} to {blocks}", got=layer, exit_code=2)
    return layer % (blocks + 1)


def _json(path: Path) -> JsonDict:
    try:
        content: JsonDict = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlavaError(f"damaged {path}", got=error, do="download it again") from None
    return content
