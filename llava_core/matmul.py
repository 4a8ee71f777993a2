"""What a device can do at best, by which everything else on it is judged."""

from __future__ import annotations

import functools
import time

import torch

LEAST = 8
"""Products that are timed, however long they take."""


@functools.lru_cache(maxsize=4)
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of large matrix products, the best of several for about so many seconds.

    On a CPU the seconds are those that its threads computed, over how many they are: on a busy machine the
    clock on the wall counts the neighbours' work too. If some threads of torch stay idle, that is too fast.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)

    def timed() -> float:
        cpu, wall = time.process_time(), time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        wall = time.perf_counter() - wall
        if device.type != "cpu":
            return wall
        return min(wall, (time.process_time() - cpu) / torch.get_num_threads())

    timed()
    end, best, count = time.perf_counter() + seconds, float("inf"), 0
    while time.perf_counter() < end or count < LEAST:
        best, count = min(best, timed()), count + 1
    return 2 * size**3 / best


def utilisation(operations: float, seconds: float, rate: float) -> float | None:
    """Share of a device's rate, in operations per second, that these took (MFU).

    None for one above 1, which cannot be: the rate was measured too low.
    """
    share = operations / seconds / rate
    return share if share <= 1 else None


def utilisation_shown(share: float | None) -> str:
    """Such as "38%"."""
    return "unknown (over 100%: the matmul rate was measured too low)" if share is None else f"{share:.0%}"
