"""Where the features of a run stay between two readings: on disk, in RAM or on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llava_core.cli.console import human_bytes
from llava_core.device import free_memory
from llava_core.errors import LlavaError
from train.config import Residence

AUTO_SHARE = 0.5
"""Of the free memory of a device, the most that `auto` takes."""
CPU = torch.device("cpu")


class Kept:
    """Features of N rows in one allocation on a device, each row from when it is first read.

    A run waits for nothing at its start, and rows that it never reads take no RAM.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.features = torch.empty(shape, dtype=torch.float16, device=device)
        self.present = np.zeros(shape[0], bool)

    def take(self, indices: Sequence[int], read: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
        """A copy of the rows at `indices`; `read` gives the rows [n, T, D] that are not here yet.

        Threads may call this at once: two that miss the same row both write the same bytes.
        """
        missing = [index for index in dict.fromkeys(indices) if not self.present[index]]
        if missing:
            for index, row in zip(missing, read(missing).to(self.features.device), strict=True):
                self.features[index] = row
            self.present[missing] = True
        # Whole rows one by one: indexing with a tensor moves single numbers, four times as slowly.
        rows = [self.features[index] for index in indices]
        return torch.stack(rows) if rows else self.features[:0]  # a rank without a sample in this step


def worth_keeping(asked: Residence, repeated: bool) -> bool:
    """Whether training features are kept at all: auto has no use for what is read only once."""
    return repeated or asked != "auto"


def pick_residence(
    asked: Residence, needed: int, device: torch.device, processes: int = 1
) -> torch.device | None:
    """The device to keep so many bytes of features on; None leaves them on disk.

    Each of the `processes` has its own GPU, and may share the RAM with the others.

    Raises LlavaError if what is asked for cannot be had.
    """
    if asked == "disk":
        return None
    places = {"gpu": [device], "ram": [CPU], "auto": [device, CPU]}[asked]
    if asked == "gpu" and device == CPU:
        raise LlavaError("--resident gpu", expected="a run on a GPU", got=f"one on {device}")
    share = AUTO_SHARE if asked == "auto" else 1
    for place in places:
        if needed * (processes if place == CPU else 1) <= share * (free := free_memory(place)):
            return place
    if asked == "auto":
        return None
    raise LlavaError(
        f"--resident {asked}",
        expected=f"{human_bytes(needed)} of free memory",
        got=human_bytes(free),
        do="use --resident disk, or lower --max-samples",
    )
