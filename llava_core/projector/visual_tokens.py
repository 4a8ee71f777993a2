"""Visual tokens: which of an encoder's tokens, or which joins of them, the language model sees."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from llava_core.errors import LlavaError


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
