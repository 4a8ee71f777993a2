"""Where tensors live and how precise they are, decided in one place."""

from __future__ import annotations

import torch

from llava_core.errors import LlavaError


def pick_device(name: str) -> torch.device:
    """`auto` -> the GPU if there is one, else the CPU. Raises LlavaError for `cuda` without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LlavaError("--device cuda", got="no GPU that this torch can use", do="use --device cpu")
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
