"""Where tensors live and how precise they are, decided in one place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from llava_core.errors import LlavaError

DEVICE_ERRORS = re.compile(r"CUDA (driver )?error|cuDNN error|CUBLAS_STATUS|device-side assert")


def pick_device(name: str) -> torch.device:
    """`auto` -> the GPU if there is one, else the CPU. Raises LlavaError for `cuda` without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LlavaError("--device cuda", got="no GPU that this torch can use", do="use --device cpu")
    if name == "cuda" and torch.cuda.device_count() > 1:
        return torch.device("cuda", local_gpu(os.environ, torch.cuda.device_count()))
    return torch.device(name)


def local_gpu(environment: Mapping[str, str], visible: int) -> int:
    """Which of several visible GPUs is this worker's: LOCAL_RANK (torchrun) or SLURM_LOCALID, else the first.

    More workers than GPUs share them. Raises LlavaError (wrong usage) for anything but a number from 0 on.
    """
    name = "LOCAL_RANK" if environment.get("LOCAL_RANK") else "SLURM_LOCALID"
    value = environment.get(name) or "0"
    if not value.isdecimal():
        raise LlavaError(name, expected="a whole number from 0 on", got=value, exit_code=2)
    return int(value) % visible


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """A launcher's variable; None if it is unset or empty. Raises LlavaError (wrong usage) for a text."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise LlavaError(name, expected="a whole number", got=value, exit_code=2) from None


def cpu_cores(environment: Mapping[str, str] = os.environ) -> int:
    """CPU cores for this process: those it may run on, among the LOCAL_WORLD_SIZE workers of torchrun."""
    beside = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(beside) if beside.isdecimal() else 1))


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def is_device_failure(error: Exception) -> bool:
    """Whether the device itself failed (a CUDA, cuDNN or cuBLAS error), so that other work fails too."""
    named = getattr(torch, "AcceleratorError", None)  # torch >= 2.8
    return (named is not None and isinstance(error, named)) or bool(DEVICE_ERRORS.search(str(error)))
