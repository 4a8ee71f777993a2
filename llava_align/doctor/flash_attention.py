"""Choosing the flash-attn wheel for this Python, torch and CUDA, by its naming scheme (setup.py of 2.8.3)."""

from __future__ import annotations

import dataclasses

RELEASE = "2.8.3"
TORCHES = ((2, 4), (2, 5), (2, 6), (2, 7), (2, 8))
PYTHONS = ((3, 9), (3, 10), (3, 11), (3, 12), (3, 13))
PLATFORM = "linux_x86_64"
CUDA = 12
"""Versions and platform that RELEASE has wheels for."""
OWN_VARLEN = (2, 10)
"""First version of torch with variable-length attention of its own."""


@dataclasses.dataclass(frozen=True)
class Place:
    """The environment to install a wheel into."""

    python: tuple[int, int]
    torch: str
    """Version, such as 2.8.0+cu128."""
    cuda: str | None
    """Version that torch was built for; None for CPUs."""
    cxx11_abi: bool
    """Whether torch was built with the C++11 ABI."""
    platform: str
    """Platform tag, such as linux_x86_64."""

    @property
    def release(self) -> tuple[int, int]:
        """Version of torch, without its build."""
        major, minor = self.torch.split(".")[:2]
        return int(major), int(minor)


def wheel(place: Place) -> str | None:
    """URL of the wheel; None if the release has none for this environment."""
    built = place.cuda is not None and int(place.cuda.split(".")[0]) == CUDA and place.platform == PLATFORM
    if not built or place.release not in TORCHES or place.python not in PYTHONS:
        return None
    torch, python = ".".join(map(str, place.release)), "cp{}{}".format(*place.python)
    abi = str(place.cxx11_abi).upper()
    name = f"flash_attn-{RELEASE}+cu{CUDA}torch{torch}cxx11abi{abi}-{python}-{python}-{PLATFORM}.whl"
    return f"https://github.com/Dao-AILab/flash-attention/releases/download/v{RELEASE}/{name}"


def advice(place: Place) -> str:
    """Whether flash-attn is needed, and how to install it."""
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
