"""The frozen vision encoder (vision tower): pixels to visual tokens [B, T, D].

`open.py` loads it from a folder. The language side never imports this module.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.identity import EncoderIdentity
from llava_core.types import JsonDict
from llava_core.vision.preprocess import Decoded, Preprocess


class TwoTowers(Protocol):
    """The parts of a CLIP that embed pictures and texts in one space; no embedding is L2-normalised."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, S, S] -> [B, P]."""

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens after the final norm [B, T, D] -> [B, P]."""

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L] -> [B, P]."""


class TextTokenizer(Protocol):
    """The tokenizer of a text tower."""

    context: int
    """Most tokens of a text, with one before and one after it."""

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> token ids [texts, L], padded and truncated."""

    def length(self, text: str) -> int:
        """Number of a text's tokens, with the two around it, before it is truncated."""


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """A vision encoder in eval mode whose weights take no gradients."""

    preprocess: Preprocess
    encoder: JsonDict
    """model_id, weights_sha256, layer, tokens, width and dtype, as a shard records them."""
    device: torch.device
    dtype: torch.dtype
    _tokens: Callable[[torch.Tensor], torch.Tensor]
    """Normalised pixels [B, 3, S, S] -> [B, T, D]."""
    network: torch.nn.Module
    """The module that computes the tokens: a ChineseClip, or a vision model of transformers."""
    _layers: Callable[[torch.Tensor, Sequence[int | None]], list[torch.Tensor]] | None = None
    """Normalised pixels -> the tokens of several layers, in one pass; None if each layer is opened anew."""
    _blocks: int = 0
    """Number of blocks, by which layers are counted."""
    _clip: TwoTowers | None = None
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

    @property
    def name(self) -> str:
        return str(self.encoder["model_id"])

    def decode(self, image: bytes) -> Decoded:
        """An encoded image file -> the pixels that the encoder takes. Raises ImageError."""
        return self.preprocess.decode_image(image)

    def encode_images(self, images: Sequence[Decoded]) -> torch.Tensor:
        """Pixels of images -> fp32 features [images, T, D]."""
        return self.encode(np.stack([image.pixels for image in images]))

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 [B, S, S, 3] as `preprocess.decode_image` gives them -> fp32 features [B, T, D]."""
        moved = torch.as_tensor(pixels).to(self.device, non_blocking=True)
        return self._tokens(self.preprocess.normalise(moved).to(self.dtype)).float()

    def at(self, layer: int | None) -> VisionTower | None:
        """The same network at another layer; None if it must be opened for it."""
        if (layers := self._layers) is None:
            return None
        index = layer_index(layer, self._blocks, self.encoder["model_id"])
        encoder = {**self.encoder, "layer": index}
        return dataclasses.replace(self, encoder=encoder, _tokens=lambda pixels: layers(pixels, [index])[0])

    @torch.inference_mode()
    def encode_image_embedding(self, pixels: torch.Tensor | np.ndarray) -> torch.Tensor:
        """uint8 [B, S, S, 3] -> L2-normalised image embeddings [B, P] in the space of `encode_text`."""
        clip, _ = self._both_towers()
        moved = self.preprocess.normalise(torch.as_tensor(pixels).to(self.device)).to(self.dtype)
        return F.normalize(clip.encode_image(moved).float(), dim=-1)

    @torch.inference_mode()
    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B, T, D] of the last layer -> L2-normalised image embeddings [B, P]."""
        clip, _ = self._both_towers()
        return F.normalize(clip.embed_tokens(features.to(self.device, self.dtype)).float(), dim=-1)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts, of which `most_tokens` tokens count -> L2-normalised embeddings [texts, P]."""
        clip, tokenizer = self._both_towers()
        return F.normalize(clip.encode_text(tokenizer(texts).to(self.device)).float(), dim=-1)

    @property
    def most_tokens(self) -> int:
        """Tokens of a text that `encode_text` reads."""
        return self._both_towers()[1].context - 2

    def cuts(self, text: str) -> bool:
        """Whether `encode_text` truncates this text."""
        return self.text_length(text) > self.most_tokens

    def text_length(self, text: str) -> int:
        """Number of a text's tokens."""
        return self._both_towers()[1].length(text) - 2

    @property
    def reads_text(self) -> bool:
        """Whether it was opened with a text tower."""
        return self._tokenizer is not None

    def _both_towers(self) -> tuple[TwoTowers, TextTokenizer]:
        if self._clip is None or self._tokenizer is None:
            raise LlavaError(
                f"{self.encoder['model_id']} has no text tower here",
                expected="a Chinese-CLIP, or a CLIP from Hugging Face, opened with its text tower",
            )
        return self._clip, self._tokenizer


@torch.inference_mode()
def encode_layers(towers: Sequence[VisionTower], pixels: torch.Tensor) -> list[torch.Tensor]:
    """`encode` by each of these towers, which have one network; it runs once."""
    first = towers[0]
    if first._layers is None or len(towers) == 1:
        return [tower.encode(pixels) for tower in towers]
    moved = first.preprocess.normalise(pixels.to(first.device, non_blocking=True)).to(first.dtype)
    wanted = [tower.encoder["layer"] for tower in towers]
    return [features.float() for features in first._layers(moved, wanted)]


def encoder_record(
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


def layer_index(layer: int | None, blocks: int, encoder: str) -> int | None:
    """`layer` as a non-negative index, so that each has one number. Raises LlavaError if out of range."""
    if layer is None:
        return None
    if not -blocks - 1 <= layer <= blocks:
        what, expected = f"{encoder} has no layer {layer}", f"{-blocks - 1} to {blocks}"
        raise LlavaError(what, expected=expected, do="correct --layer or --layers", exit_code=2)
    return layer % (blocks + 1)


def read_json(path: Path) -> JsonDict:
    try:
        content: JsonDict = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlavaError(f"damaged {path}", got=error, do="download it again") from None
    return content
