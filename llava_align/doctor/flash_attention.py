"""Which of flash-attn's wheels fits, by the names of its releases (its setup.py, version 2.8.3)."""

from __future__ import annotations

import dataclasses

RELEASE = "2.8.3"
TORCHES = ((2, 4), (2, 5), (2, 6), (2, 7), (2, 8))
PYTHONS = ((3, 9), (3, 10), (3, 11), (3, 12), (3, 13))
PLATFORM = "linux_x86_64"
CUDA = 12
"""What the release has wheels for."""
OWN_VARLEN = (2, 10)
"""The first torch whose own attention takes samples of different lengths in one call."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a wheel is to be installed."""

    python: tuple[int, int]
    torch: str
    """Version, such as 2.8.0+cu128."""
    cuda: str | None
    """Version that torch was built for; None for CPUs."""
    cxx11_abi: bool
    """Whether torch was built with the C++11 ABI."""
    platform: str
    """Such as linux_x86_64."""

    @property
    def release(self) -> tuple[int, int]:
        """Version of torch, without its build."""
        major, minor = self.torch.split(".")[:2]
        return int(major), int(minor)


def wheel(place: Place) -> str | None:
    """Address of the wheel, or None where the release has none."""
    built = place.cuda is not None and int(place.cuda.split(".")[0]) == CUDA and place.platform == PLATFORM
    if not built or place.release not in TORCHES or place.python not in PYTHONS:
        return None
    torch, python = ".".join(map(str, place.release)), "cp{}{}".format(*place.python)
    abi = str(place.cxx11_abi).upper()
    name = f"flash_attn-{RELEASE}+cu{CUDA}torch{torch}cxx11abi{abi}-{python}-{python}-{PLATFORM}.whl"
    return f"https://github.com/Dao-AILab/flash-attention/releases/download/v{RELEASE}/{name}"


def advice(place: Place) -> str:
    """Whether flash-attn is needed, and how it is had."""
    if place.cuda is None:
        return "none needed: this torch is for CPUs"
    if place.release >= OWN_VARLEN:
        return f"optional: torch {place.torch} has its own variable-length attention"
    if address := wheel(place):
        return f"pip install {address}"
    where = (
        f"torch {place.torch}, CUDA {place.cuda}, Python {'.'.join(map(str, place.python))}, {place.platform}"
    )
    return f"no wheel of {RELEASE} for {where}; torch >= 2.10 has its own variable-length attention"
