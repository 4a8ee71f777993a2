"""The result of `infer lens`, which its PNG and its page show."""

from __future__ import annotations

import dataclasses

import numpy as np

from infer.lens.readout import Words

GAIN, MOST = (255, 176, 32), 4.0
"""Full colour of a piece of text that the image makes likelier, and the nats of loss saved that give it."""


def gain_colour(gain: float) -> tuple[int, int, int]:
    """RGB behind a piece of text: from white, where the image saves no loss, to GAIN; `gain` is in nats."""
    share = min(1.0, max(0.0, gain / MOST))
    red, green, blue = (int(np.interp(share, (0, 1), (255, full))) for full in GAIN)
    return red, green, blue


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
