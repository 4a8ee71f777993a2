"""Perceiver resampler: learned queries attend to the features, whatever their number.

Flamingo (Alayrac et al. 2022, arXiv:2204.14198; OpenFlamingo's `PerceiverResampler`), between features and
embeddings as in Idefics2 (arXiv:2405.02246: 64 queries, 3 layers), here with a linear layer after it.
"""

from __future__ import annotations

import torch
from torch import nn

from llava_core.projector.kinds.attention import Attention

HEAD = 64
"""Width of a head."""
WIDENING = 4
"""Width of a feed-forward layer, as a multiple of the features'."""


class Perceiver(nn.Module):
    """[..., T, in_width] -> [..., queries, out_width]. 768 -> 1024 has 22,085,632 parameters."""

    def __init__(self, in_width: int, out_width: int, queries: int = 64, depth: int = 3) -> None:
        """`depth`: number of layers, each of attention and a feed-forward network."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, in_width))
        self.layers = nn.ModuleList(Layer(in_width) for _ in range(depth))
        self.norm = nn.LayerNorm(in_width)
        self.out = nn.Linear(in_width, out_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.queries.expand(*features.shape[:-2], -1, -1)
        for layer in self.layers:
            x = layer(x, features)
        projected: torch.Tensor = self.out(self.norm(x))
        return projected

    def tokens_out(self, tokens: int) -> int:
        return len(self.queries)


class Layer(nn.Module):
    """Queries [..., Q, width] attend to features [..., T, width] and to one another -> [..., Q, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_features, self.norm_queries = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, HEAD, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, WIDENING * width, bias=False),
            nn.GELU(),
            nn.Linear(WIDENING * width, width, bias=False),
        )

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        normed = self.norm_queries(queries)
        seen = torch.cat([self.norm_features(features), normed], -2)
        queries = queries + self.attention(normed, seen, seen)
        changed: torch.Tensor = queries + self.feed_forward(queries)
        return changed
