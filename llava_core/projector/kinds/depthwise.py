"""Depthwise convolution of a grid of tokens, a part of two kinds of projector."""

from __future__ import annotations

import torch
from torch import nn


class Depthwise(nn.Conv2d):
    """[N, rows, columns, width] -> the same shape: 3x3, each channel by itself, zeros around the grid."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__(width, width, 3, padding=1, groups=width, bias=bias)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return super().forward(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
