"""The result of `infer lens`, which its PNG and its page show."""

from __future__ import annotations

import dataclasses

import numpy as np

from infer.lens.readout import Words


@dataclasses.dataclass(frozen=True)
class Panel:
    """Words of one projector's visual tokens by one readout."""

    projector: str
    readout: str
    words: list[Words]
    """Words of each patch, row by row."""
    class_words: Words
    """Words of the class token; empty if the projector drops it."""


@dataclasses.dataclass(frozen=True)
class LensResult:
    """Everything that the PNG and the page show."""

    image: str
    pixels: np.ndarray
    """uint8 [S, S, 3], as the encoder takes them."""
    side: int
    """Patches along a side."""
    panels: list[Panel]
    other: str
    """Path or URL of the image to compare with, or "a blank image"."""
    pieces: list[str]
    """The caption in whole characters, and its end, which is empty."""
    loss: list[float]
    """Loss of each piece in nats, with the image."""
    other_loss: list[float]
    """Loss of each piece in nats, with the other image."""
