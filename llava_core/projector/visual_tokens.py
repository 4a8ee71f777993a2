"""Visual token selection and merging: all, patches, average pooling and pixel shuffle of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from llava_core.errors import LlavaError


class VisualTokens(Protocol):
    """Selects or merges an encoder's tokens: [..., T, D] -> [..., tokens_out(T), D * widening]."""

    widening: int

    def __call__(self, features: torch.Tensor) -> torch.Tensor: ...

    def tokens_out(self, tokens: int) -> int:
        """Number of visual tokens for `tokens` of an encoder. Raises LlavaError if it does not allow this."""


class All:
    """All tokens, with the class token: 197 stay 197."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features

    def tokens_out(self, tokens: int) -> int:
        return tokens


class Patches:
    """Patch tokens without a class token: 197 become 196."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features[..., -self.tokens_out(features.shape[-2]) :, :]

    def tokens_out(self, tokens: int) -> int:
        return grid_side(tokens) ** 2


class Pool:
    """Mean of each block of patches, without a class token: 197 become 49, with `factor` 7 they become 4."""

    widening = 1

    def __init__(self, factor: int = 2) -> None:
        """`factor`: patches along each side of a block."""
        self.factor = factor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features, self.factor).mean(-2)

    def tokens_out(self, tokens: int) -> int:
        return merged_side(tokens, self.factor) ** 2


class Shuffle:
    """Each block of patches concatenated, without a class token: 197 become 49, four times as wide.

    Space to depth, or pixel shuffle (arXiv:2404.16821): it loses no information; the projector gets
    `factor`² times as many weights.
    """

    def __init__(self, factor: int = 2) -> None:
        """`factor`: patches along each side of a block."""
        self.factor, self.widening = factor, factor**2

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features, self.factor).flatten(-2)

    def tokens_out(self, tokens: int) -> int:
        return merged_side(tokens, self.factor) ** 2


INSTEAD_OF_GRID = "use --projector linear, mlp or perceiver, which need no grid of patches"
"""Advice where a projector needs one, and there is none."""


def grid_side(tokens: int, do: str = "use --visual-tokens all") -> int:
    """Side of the square of patches that `tokens` are, with or without a class token.

    The number tells which: no two squares above 0 differ by one. Raises LlavaError, with the advice `do`, for
    any other number.
    """
    side = math.isqrt(tokens)
    if tokens - side**2 > 1:
        raise LlavaError(
            f"{tokens} visual tokens are no square of patches",
            expected="a square such as 256, or one more for a class token, such as 197",
            do=do,
        )
    return side


def merged_side(
    tokens: int, factor: int, flag: str = "--visual-tokens", names: Sequence[str] = ("pool", "shuffle")
) -> int:
    """`grid_side` divided by `factor`, which is part of one of these `names` after a flag.

    Raises LlavaError if that leaves a remainder.
    """
    own = flag == "--visual-tokens"
    side = grid_side(tokens) if own else grid_side(tokens, INSTEAD_OF_GRID)
    if side % factor:
        factors = [str(n) for n in range(2, side + 1) if side % n == 0]
        some = "".join(f"{name}{factors[0]}, " for name in names) if factors else ""
        raise LlavaError(
            f"a grid of {side}x{side} patches cannot be cut into blocks of {factor}x{factor}",
            expected=f"a factor of {' or '.join(factors) or 1}",
            do=f"use {flag} {some}{'all or patches' if own else 'linear, mlp or perceiver'}",
        )
    return side // factor


def blocks(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Tokens [..., T, D] -> `factor` x `factor` blocks of patches, row by row: [..., blocks, factor², D]."""
    side = merged_side(features.shape[-2], factor)
    *batch, _, width = features.shape
    patches = features[..., -((factor * side) ** 2) :, :]
    # axes: row of blocks, row in the block, column of blocks, column in the block
    grid = patches.reshape(*batch, side, factor, side, factor, width)
    return grid.transpose(-4, -3).reshape(*batch, side * side, factor**2, width)
