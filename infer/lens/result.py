"""The result of `infer lens`, which its PNG and its page show."""

from __future__ import annotations

import dataclasses

import numpy as np

from infer.lens.readout import Words
from llava_core.cli.console import visible
from llava_core.cli.translation import translated

GAIN, MOST = (255, 176, 32), 4.0
"""Full colour of a piece of text that the image makes likelier, and the nats of loss saved that give it."""
BLANK = "a blank image"
"""What the image is compared with by default."""
PLAIN = 4.0
"""Standard deviation of a patch's pixels, in levels of 255, below which it shows one colour."""


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
    """Path or URL of the image to compare with, or BLANK."""
    pieces: list[str]
    """The caption in whole characters, and its end, which is empty."""
    loss: list[float]
    """Loss of each piece in nats, with the image."""
    other_loss: list[float]
    """Loss of each piece in nats, with the other image."""

    @property
    def plain(self) -> list[bool]:
        """Whether each patch, row by row, shows one colour."""
        rows = np.array_split(self.pixels.astype(float), self.side)
        patches = [patch for row in rows for patch in np.array_split(row, self.side, axis=1)]
        return [bool(patch.std(axis=(0, 1)).max() < PLAIN) for patch in patches]


def key_of(other: str) -> dict[str, str]:
    """What words, grey words, the random projector and colours mean; `other`: what the image is beside."""
    words = "Each patch: the word nearest to its visual token, or predicted there (logit lens)."
    plain = "Grey words: a patch of one colour, with nothing in it to name; some word is always the nearest."
    random = "Random projector: of the same kind and scale, not trained; its words fit the image by chance."
    other = translated(BLANK) if other == BLANK else visible(other)
    return {
        "words": translated(words),
        "next": translated("Below it, smaller, the next two."),
        "plain": translated(plain),
        "random": translated(random),
        "gain": translated(f"Number and colour: nats of loss that the image saves against {other}"),
    }
