"""Linear projector of low rank: a matrix as the product of two thin ones (as in LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from torch import nn


class LowRank(nn.Sequential):
    """[..., T, in_width] -> [..., T, rank] -> [..., T, out_width]. 768 -> 1024 has 115,712 parameters."""

    def __init__(self, in_width: int, out_width: int, rank: int = 64) -> None:
        super().__init__(nn.Linear(in_width, rank, bias=False), nn.Linear(rank, out_width))
