"""MLP projector (LLaVA-1.5, Liu et al. 2023, arXiv:2310.03744: `mlp2x_gelu`)."""

from __future__ import annotations

import itertools

from torch import nn

from llava_core.errors import LlavaError


class Mlp(nn.Sequential):
    """[..., T, in_width] -> [..., T, out_width]: linear layers with GELU between them.

    768 -> 1024 has 1,837,056 parameters.
    """

    def __init__(self, in_width: int, out_width: int, depth: int = 2, width: int | None = None) -> None:
        """`depth`: number of linear layers; `width`: that between them, by default `out_width`."""
        if depth == 1 and width is not None:
            do = "use --projector mlp1, or more layers"
            raise LlavaError(
                f"--projector mlp1x{width} has no layers between which it is {width} wide", do=do
            )
        widths = [in_width, *[width or out_width] * (depth - 1), out_width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.GELU(), nn.Linear(before, after)]
        super().__init__(*layers[1:])
