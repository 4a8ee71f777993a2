"""Multi-head cross-attention, a part of two kinds of projector."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Queries [..., Q, width] and keys and values [..., K, width] -> [..., Q, width].

    It has as many heads as divide `width` and are at least `head` wide; one, if `width` is less.
    """

    def __init__(self, width: int, head: int, bias: bool) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // head), 0, -1) if width % n == 0)
        self.query = nn.Linear(width, width, bias)
        self.key = nn.Linear(width, width, bias)
        self.value = nn.Linear(width, width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        projected = (self.query(queries), self.key(keys), self.value(values))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in projected)
        attended = scaled_dot_product_attention(q, k, v)
        mixed: torch.Tensor = self.out(attended.transpose(-3, -2).flatten(-2))
        return mixed
