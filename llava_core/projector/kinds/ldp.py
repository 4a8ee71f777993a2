"""LDPv2, the lightweight downsample projector of MobileVLM V2 (Chu et al. 2024, arXiv:2402.03766).

`LDPNetV2Projector`: an MLP, average pooling of blocks, a depthwise convolution beside a shortcut. Here the
pooling comes before the MLP's last layer, which changes no result, and saves most of its operations. The
convolution starts at zero, so that the MLP sets the scale of the first tokens.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from llava_core.projector.kinds.depthwise import Depthwise
from llava_core.projector.visual_tokens import blocks, merged_side


class Ldp(nn.Module):
    """[..., T, in_width], patches of a square with or without a class token -> [..., blocks, out_width].

    768 -> 1024 has 1,847,296 parameters.
    """

    grid = True
    """Its tokens are those of one square: of several encoders one after another it makes none."""

    def __init__(self, in_width: int, out_width: int, factor: int = 2) -> None:
        """`factor`: patches along each side of a block."""
        super().__init__()
        self.factor = factor
        self.first = nn.Sequential(nn.Linear(in_width, out_width), nn.GELU())
        self.last = nn.Linear(out_width, out_width)
        self.convolution = Depthwise(out_width, bias=True)
        nn.init.zeros_(self.convolution.weight)
        assert self.convolution.bias is not None
        nn.init.zeros_(self.convolution.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.last(blocks(self.first(features), self.factor).mean(-2))
        *batch, tokens, width = pooled.shape
        grid = pooled.reshape(math.prod(batch), math.isqrt(tokens), math.isqrt(tokens), width)
        projected: torch.Tensor = pooled + self.convolution(grid).reshape(pooled.shape)
        return projected

    def tokens_out(self, tokens: int) -> int:
        return merged_side(tokens, self.factor, "--projector", ("ldp",)) ** 2
