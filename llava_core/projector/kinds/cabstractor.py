"""C-Abstractor: convolutions, average pooling to the wanted number of tokens, convolutions.

Honeybee (Cha et al. 2023, arXiv:2312.06742: `CAbstractor`, of timm's `RegStage`). Here it is as wide as the
output (there 1024), and without learned positions: the grid's size may be any.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from llava_core.errors import LlavaError
from llava_core.projector.kinds.depthwise import Depthwise
from llava_core.projector.visual_tokens import INSTEAD_OF_GRID, grid_side

EPS = 1e-6
"""Of timm's layer norms."""


class CAbstractor(nn.Module):
    """[..., T, in_width], patches of a square with or without a class token -> [..., tokens, out_width].

    768 -> 1024 has 18,322,880 parameters.
    """

    grid = True
    """Its tokens are those of one square: of several encoders one after another it makes none."""

    def __init__(self, in_width: int, out_width: int, tokens: int = 144, depth: int = 3) -> None:
        """`tokens`: a square; `depth`: blocks before the pooling, and after it."""
        super().__init__()
        self.side = math.isqrt(tokens)
        if self.side**2 != tokens:
            raise LlavaError(
                f"--projector cabstractor{tokens} pools to a square of tokens",
                expected=f"a square such as {self.side**2} or {(self.side + 1) ** 2}",
                got=tokens,
                do=f"use --projector cabstractor{self.side**2}",
            )
        widths = [in_width, *[out_width] * depth]
        self.before = nn.Sequential(*map(Block, widths[:-1], widths[1:]))
        self.after = nn.Sequential(*(Block(out_width, out_width) for _ in range(depth)))
        self.readout = nn.Sequential(
            nn.Linear(out_width, out_width), nn.SiLU(), nn.Linear(out_width, out_width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        *batch, tokens, width = features.shape
        side = grid_side(tokens)
        patches = features[..., -(side**2) :, :].reshape(math.prod(batch), side, side, width)
        pooled = adaptive_avg_pool2d(self.before(patches).permute(0, 3, 1, 2), self.side)
        projected: torch.Tensor = self.readout(self.after(pooled.permute(0, 2, 3, 1)).flatten(1, 2))
        return projected.reshape(*batch, self.side**2, projected.shape[-1])

    def tokens_out(self, tokens: int) -> int:
        side = grid_side(tokens, INSTEAD_OF_GRID)
        if side < self.side:
            raise LlavaError(
                f"--projector cabstractor{self.side**2} makes fewer tokens of many patches",
                expected=f"at most the {side**2} patches of this encoder",
                got=self.side**2,
                do=f"use --projector cabstractor{max(1, side // 2) ** 2}",
            )
        return self.side**2


class Block(nn.Module):
    """RegNet's block with squeeze and excitation: [N, rows, columns, width] -> [..., out_width].

    1x1 convolutions are linear layers here; the normalisation is over channels.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        squeezed = max(1, round(width / 4))
        self.first = nn.Sequential(
            nn.Linear(width, out_width, bias=False), nn.LayerNorm(out_width, EPS), nn.SiLU()
        )
        self.convolution = nn.Sequential(
            Depthwise(out_width, bias=False), nn.LayerNorm(out_width, EPS), nn.SiLU()
        )
        self.excitation = nn.Sequential(
            nn.Linear(out_width, squeezed), nn.SiLU(), nn.Linear(squeezed, out_width), nn.Sigmoid()
        )
        self.last = nn.Sequential(nn.Linear(out_width, out_width, bias=False), nn.LayerNorm(out_width, EPS))
        self.shortcut: nn.Module = nn.Identity()
        if width != out_width:
            self.shortcut = nn.Sequential(
                nn.Linear(width, out_width, bias=False), nn.LayerNorm(out_width, EPS)
            )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.first(grid))
        x = x * self.excitation(x.mean((1, 2), keepdim=True))
        return nn.functional.silu(self.last(x) + self.shortcut(grid))
