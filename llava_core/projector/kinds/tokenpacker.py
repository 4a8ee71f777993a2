"""TokenPacker: the middle of each block of patches attends to the whole block.

Li et al. 2024, arXiv:2407.02392: `TokenPacker`. There keys and values come from four layers of the encoder,
here from the one that the features are of.
"""

from __future__ import annotations

import torch
from torch import nn

from llava_core.projector.kinds.attention import Attention
from llava_core.projector.visual_tokens import blocks, merged_side

HEAD = 128
"""Width of a head."""
EPS = 1e-6


class TokenPacker(nn.Module):
    """[..., T, in_width], patches of a square with or without a class token -> [..., blocks, out_width].

    768 -> 1024 has 7,156,224 parameters.
    """

    grid = True
    """Its tokens are those of one square: of several encoders one after another it makes none."""

    def __init__(self, in_width: int, out_width: int, factor: int = 2) -> None:
        """`factor`: patches along each side of a block."""
        super().__init__()
        self.factor = factor
        self.query = nn.Sequential(nn.Linear(in_width, in_width, bias=False), nn.LayerNorm(in_width, EPS))
        self.key, self.value = (
            nn.Sequential(
                nn.Linear(in_width, in_width),
                nn.GELU(),
                nn.Linear(in_width, in_width),
                nn.LayerNorm(in_width, EPS),
            )
            for _ in range(2)
        )
        self.attention = Attention(in_width, HEAD, bias=True)
        self.out = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        factor, regions = self.factor, blocks(features, self.factor)
        middle = slice((factor - 1) // 2, factor // 2 + 1)  # bilinear interpolation to a point
        square = regions.reshape(*regions.shape[:-2], factor, factor, features.shape[-1])
        points = square[..., middle, middle, :].mean((-3, -2))
        query = self.query(points).unsqueeze(-2)
        packed = self.attention(query, self.key(regions), self.value(regions)).squeeze(-2)
        projected: torch.Tensor = self.out(packed)
        return projected

    def tokens_out(self, tokens: int) -> int:
        return merged_side(tokens, self.factor, "--projector", ("tokenpacker",)) ** 2
