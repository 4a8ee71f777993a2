"""Drivers of GPUs, looked for without torch, which takes seconds to import."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_core.errors import LlavaError

KINDS = {"cuda": "GPU", "mps": "Apple GPU"}
DEVICE_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg", "dri")
"""In /dev: NVIDIA's (also of Jetson), AMD's, WSL's, and any driver's with a display interface."""
LIBRARY = "libcuda.so.1"
"""NVIDIA's, which may make these files at its first use."""


def require_device(name: str, there: Mapping[str, Callable[[], bool]]) -> None:
    """Raise LlavaError for a device whose kind, such as cuda, is not there."""
    kind = name.partition(":")[0]
    if kind in KINDS and not there[kind]():
        got = f"no {KINDS[kind]} that this torch can use"
        raise LlavaError(f"--device {kind}", got=got, do="use --device cpu")


def cuda_driver(devices: Path = Path("/dev")) -> bool:
    """Whether torch may find a GPU that it calls cuda; False only if it surely finds none."""
    if any(any(devices.glob(name)) for name in DEVICE_FILES):
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL(LIBRARY)
        return True
    return False


DRIVERS: Mapping[str, Callable[[], bool]] = {"cuda": cuda_driver, "mps": lambda: sys.platform == "darwin"}
