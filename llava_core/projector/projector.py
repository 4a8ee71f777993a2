"""The one part that trains: vision features to token embeddings of the language model.

A projector is a choice of visual tokens (VISUAL_TOKENS), which has no weights, then a map of each of them to
the language model's width (PROJECTORS).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from llava_core.errors import LlavaError


class Linear(nn.Linear):
    """[..., T, in_width] -> [..., T, out_width]. 768 -> 1024 has 787,456 parameters."""


class Mlp(nn.Sequential):
    """Linear, GELU, linear with the output's width between them (LLaVA-1.5's mlp2x_gelu)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": Linear, "mlp": Mlp}


class VisualTokens(Protocol):
    """What the language model gets to see: [..., T, D] -> [..., tokens_out(T), D * widening]."""

    widening: int

    def __call__(self, features: torch.Tensor) -> torch.Tensor: ...

    def tokens_out(self, tokens: int) -> int:
        """Raises LlavaError if an encoder's number of tokens cannot be cut so."""


class All:
    """Every token, a class token included: 197 stay 197."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def tokens_out(self, tokens: int) -> int:
        return tokens


class Patches:
    """The patches without a class token: 197 become 196."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., -self.tokens_out(features.shape[-2]) :, :]

    def tokens_out(self, tokens: int) -> int:
        return grid_side(tokens) ** 2


class Pool:
    """The mean of each 2x2 patches, without a class token: 197 become 49."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features).mean(-2)

    def tokens_out(self, tokens: int) -> int:
        return halved_side(tokens) ** 2


class Shuffle:
    """Each 2x2 patches side by side in one token, without a class token: 197 become 49, four times as wide.

    Space to depth, or pixel shuffle (arXiv:2404.16821): nothing is lost, and the map has four times as many
    weights.
    """

    widening = 4

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features).flatten(-2)

    def tokens_out(self, tokens: int) -> int:
        return halved_side(tokens) ** 2


VISUAL_TOKENS: dict[str, Callable[[], VisualTokens]] = {
    "all": All,
    "patches": Patches,
    "pool": Pool,
    "shuffle": Shuffle,
}


def grid_side(tokens: int) -> int:
    """Patches along a side of the square that an encoder's tokens form, a class token before them or not.

    The number says which: no two squares above 0 differ by one. Raises LlavaError for any other number.
    """
    side = math.isqrt(tokens)
    if tokens - side**2 > 1:
        raise LlavaError(
            f"{tokens} visual tokens are no square of patches",
            expected="a square such as 256, or one more for a class token, such as 197",
            do="use --visual-tokens all",
        )
    return side


def halved_side(tokens: int) -> int:
    """Half of `grid_side`. Raises LlavaError for an odd one."""
    side = grid_side(tokens)
    if side % 2:
        raise LlavaError(
            f"a grid of {side}x{side} patches cannot be halved",
            expected="an even number of patches along each side",
            do="use --visual-tokens all or patches",
        )
    return side // 2


def blocks(features: torch.Tensor) -> torch.Tensor:
    """Tokens [..., T, D] -> the patches of each 2x2 block, row by row, as [..., blocks, 4, D]."""
    half = halved_side(features.shape[-2])
    *batch, _, width = features.shape
    patches = features[..., -((2 * half) ** 2) :, :]
    # row of blocks, row in the block, column of blocks, column in the block
    grid = patches.reshape(*batch, half, 2, half, 2, width)
    return grid.transpose(-4, -3).reshape(*batch, half * half, 4, width)


class Projector(nn.Module):
    """Features [..., T, in_width] -> visual tokens [..., tokens_out(T), out_width]."""

    def __init__(self, kind: str, in_width: int, out_width: int, visual_tokens: str = "all") -> None:
        super().__init__()
        self.config = {
            "kind": kind,
            "in_width": in_width,
            "out_width": out_width,
            "visual_tokens": visual_tokens,
        }
        self.select = VISUAL_TOKENS[visual_tokens]()
        self.map = PROJECTORS[kind](in_width * self.select.widening, out_width)
        """All weights; a checkpoint holds them by their names in here."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.map(self.select(features))
        return projected

    def tokens_out(self, tokens: int) -> int:
        """Visual tokens the language model sees for an encoder's. Raises LlavaError if they do not fit."""
        return self.select.tokens_out(tokens)


def build_projector(kind: str, in_width: int, out_width: int, visual_tokens: str = "all") -> Projector:
    """A projector of a kind in PROJECTORS on a choice in VISUAL_TOKENS, with torch's default initialisation.

    Raises LlavaError for an unknown kind or choice.
    """
    for name, known in ((kind, PROJECTORS), (visual_tokens, VISUAL_TOKENS)):
        if name not in known:
            what = "projector" if known is PROJECTORS else "visual tokens"
            raise LlavaError(f"unknown {what} {name!r}", expected=" or ".join(known))
    return Projector(kind, in_width, out_width, visual_tokens)


@torch.no_grad()
def match_scale(projector: nn.Module, features: torch.Tensor, target_rms: float) -> None:
    """Scale the last linear layer so that projected `features` [..., T, in_width] have this RMS per number.

    A token far larger or smaller than the model's own embeddings leaves the range its first block was trained
    on, and the first hundred steps go into undoing that.
    """
    last = [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.zero_()
    last.weight.mul_(target_rms / projector(features).pow(2).mean().sqrt())


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
