"""Geometry: how a picture of any shape becomes the encoder's square; a shard records it as `crop`.

center N   the shorter side to N pixels, then the middle square (CLIP, DINOv2)
pad        the whole picture, centred on a square of the mean colour (LLaVA's `expand2square`)
squash     the whole picture, whatever its aspect ratio (Chinese-CLIP, SigLIP)
"""

from __future__ import annotations

from typing import Literal, get_args

Fit = Literal["crop", "pad", "squash"]
"""The values of --fit."""


def fit_of(crop: object) -> Fit | None:
    """The --fit that a recorded `crop` comes from; None if it is unknown."""
    known: dict[object, Fit] = {fit: fit for fit in get_args(Fit)}
    return "crop" if str(crop).startswith("center ") else known.get(crop)


def crop_of(fit: Fit, own: str, size: int) -> str:
    """`crop` for this fit by an encoder whose own is `own`, and whose square is `size` pixels wide."""
    if fit == "crop":
        return own if fit_of(own) == fit else f"center {size}"
    return fit


def resized(crop: str, size: int, width: int, height: int) -> tuple[int, int]:
    """Width and height to which the whole picture is scaled, before it is cropped or padded."""
    if crop == "squash":
        return size, size
    if crop == "pad":
        scale = size / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))
    scale = int(crop.split()[1]) / min(width, height)
    return round(width * scale), round(height * scale)


def kept_share(crop: str, size: int, aspect: float) -> float:
    """Share of a picture's area that the encoder sees; `aspect` is its longer side over its shorter one."""
    if fit_of(crop) != "crop":
        return 1.0
    side = int(crop.split()[1])
    return min(1.0, size / side) * min(1.0, size / (side * aspect))
