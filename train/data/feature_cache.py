"""Where features stay once they have been read (--resident): on disk, in RAM or on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llava_core.cli.console import human_bytes
from llava_core.device import free_memory
from llava_core.errors import LlavaError
from train.config import Residence

AUTO_SHARE = 0.5
"""Share of a device's free memory that `auto` takes at most."""
CPU = torch.device("cpu")


class FeatureCache:
    """Features of N rows in one allocation on a device, filled row by row as they are first read.

    So a run starts at once, and rows that it never reads take no RAM.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.features = torch.empty(shape, dtype=torch.float16, device=device)
        self.present = np.zeros(shape[0], bool)

    def take(self, indices: Sequence[int], read: Callable[[Sequence[int]], torch.Tensor]) -> torch.Tensor:
        """A copy of the rows at `indices` [n, T, D]; `read` gives those that are not here yet.

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


def worth_caching(asked: Residence, repeated: bool) -> bool:
    """Whether training features are cached at all: auto leaves on disk what is read only once."""
    return repeated or asked != "auto"


def pick_residence(
    asked: Residence, needed: int, device: torch.device, processes: int = 1
) -> torch.device | None:
    """The device on which to cache `needed` bytes of features; None leaves them on disk.

    Each of the `processes` has its own GPU, and may share the RAM with the others. Raises LlavaError if the
    device that is asked for is not there or has too little free memory.
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
