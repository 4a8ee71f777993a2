"""Loading a vision encoder: the folder's layout (registered, ModelScope, Hugging Face) selects the loader."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from llava_core.device import encoder_dtype
from llava_core.errors import LlavaError, as_llava_error
from llava_core.geometry import Fit
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import MODELSCOPE_FILES, registered_layout, require_vision_encoder
from llava_core.vision.hugging_face import open_hugging_face
from llava_core.vision.modelscope import open_modelscope
from llava_core.vision.tower import VisionTower

if TYPE_CHECKING:  # it imports transformers, which takes a second
    from llava_core.projector.checkpoint import Provenance


class EncoderLayout(Protocol):
    """A folder layout in `registry.VISION_ENCODERS`: a class with static methods, never instantiated."""

    @staticmethod
    def recognises(folder: Path) -> bool:
        """Whether the folder has this layout; may read file names and small files."""

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
    fit: Fit | None = None,
    text: bool = False,
) -> VisionTower:
    """Load the encoder in `folder`, frozen; by default in the type that `encoder_dtype` gives.

    `layer` selects an entry of transformers' `hidden_states` (0 the input of the first block, -1 the output
    of the last, -2 LLaVA's choice) instead of all tokens after the final layer norm. `fit` replaces the
    geometry of the encoder's own processor. With `text`, its text tower is loaded as well, if it has one.

    Raises LlavaError if a file is missing or damaged, or the kind of encoder is unknown.
    """
    device = torch.device(device)
    dtype = dtype or encoder_dtype(device)
    require_vision_encoder(folder)
    if registered := registered_layout(folder):
        with as_llava_error(f"the vision encoder {registered.__name__} cannot open {folder}"):
            tower: VisionTower = registered.open(folder, device, dtype, layer, decode)
    elif (folder / MODELSCOPE_FILES[0]).exists():
        tower = open_modelscope(folder, device, dtype, layer, decode, text)
    else:
        tower = open_hugging_face(folder, device, dtype, layer, decode, text)
    return dataclasses.replace(tower, preprocess=tower.preprocess.fitted(fit))


def open_recorded_tower(
    folder: Path, recorded: EncoderIdentity, device: str | torch.device = "cpu", text: bool = False
) -> VisionTower:
    """The encoder in `folder`, with the layer, decoding and fit that features or a checkpoint record.

    Whether it is the same encoder is not compared.
    """
    return open_vision_tower(folder, device, text=text, **recorded.flags)


def open_trained_tower(folder: Path, trained: Provenance, device: str | torch.device = "cpu") -> VisionTower:
    """`open_recorded_tower` for a projector. Raises LlavaError if it was trained on another encoder, or on
    several (`fused.open_trained_towers`)."""
    if trained.encoder.fusion:
        raise LlavaError(
            "this command takes no projector of several encoders",
            expected="one that was trained without --fuse",
            got=trained.encoder,
        )
    tower = open_recorded_tower(folder, trained.encoder, device)
    trained.require_encoder(tower.identity)
    return tower
