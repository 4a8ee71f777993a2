"""What a device can do at best, by which everything else on it is judged."""

from __future__ import annotations

import functools
import time

import torch


@functools.lru_cache(maxsize=4)
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of large matrix products, the best of several for about so many seconds."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)

    def timed() -> float:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        return time.perf_counter() - began

    timed()
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        best = min(best, timed())
    return 2 * size**3 / best
