"""Visual token selection and pooling: all, patches, 2x2 average pooling, 2x2 pixel shuffle."""

from __future__ import annotations

import math
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
    """Mean of each 2x2 block of patches, without a class token: 197 become 49."""

    widening = 1

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features).mean(-2)

    def tokens_out(self, tokens: int) -> int:
        return halved_side(tokens) ** 2


class Shuffle:
    """Each 2x2 block of patches concatenated, without a class token: 197 become 49, four times as wide.

    Space to depth, or pixel shuffle (arXiv:2404.16821): it loses no information; the projector gets four
    times as many weights.
    """

    widening = 4

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return blocks(features).flatten(-2)

    def tokens_out(self, tokens: int) -> int:
        return halved_side(tokens) ** 2


def grid_side(tokens: int) -> int:
    """Side of the square of patches that `tokens` are, with or without a class token.

    The number tells which: no two squares above 0 differ by one. Raises LlavaError for any other number.
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
    """Half of `grid_side`. Raises LlavaError if that is odd."""
    side = grid_side(tokens)
    if side % 2:
        raise LlavaError(
            f"a grid of {side}x{side} patches cannot be halved",
            expected="an even number of patches along each side",
            do="use --visual-tokens all or patches",
        )
    return side // 2


def blocks(features: torch.Tensor) -> torch.Tensor:
    """Tokens [..., T, D] -> 2x2 blocks of patches, row by row: [..., blocks, 4, D]."""
    half = halved_side(features.shape[-2])
    *batch, _, width = features.shape
    patches = features[..., -((2 * half) ** 2) :, :]
    # axes: row of blocks, row in the block, column of blocks, column in the block
    grid = patches.reshape(*batch, half, 2, half, 2, width)
    return grid.transpose(-4, -3).reshape(*batch, half * half, 4, width)
