"""Opening a vision encoder: the layout of its folder says by which loader."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from llava_core.device import default_dtype
from llava_core.input_folders import MODELSCOPE_FILES, registered_layout, require_vision_encoder
from llava_core.projector.checkpoint import Provenance
from llava_core.vision.hugging_face import open_hugging_face
from llava_core.vision.modelscope import open_modelscope
from llava_core.vision.tower import VisionTower


class EncoderLayout(Protocol):
    """A layout of folders that `registry.VISION_ENCODERS` has: a class, never instantiated."""

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Whether the folder has this layout; reads its names, and small files at most."""

    @staticmethod
    def open(
        folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str
    ) -> VisionTower:
        """See `open_vision_tower`."""


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
    if registered := registered_layout(folder):
        tower: VisionTower = registered.open(folder, device, dtype, layer, decode)
        return tower
    if (folder / MODELSCOPE_FILES[0]).exists():
        return open_modelscope(folder, device, dtype, layer, decode, text)
    return open_hugging_face(folder, device, dtype, layer, decode)


def open_trained_tower(folder: Path, trained: Provenance, device: str | torch.device = "cpu") -> VisionTower:
    """The encoder in `folder`, with the layer and the decoding that a projector was trained on.

    Raises LlavaError if it is another encoder.
    """
    layer = trained.encoder.encoder.get("layer")
    decode = trained.encoder.preprocess.get("decode", "draft")
    tower = open_vision_tower(folder, device, layer=layer, decode=decode)
    trained.require_encoder(tower.identity)
    return tower
