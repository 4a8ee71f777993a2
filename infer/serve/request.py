"""A question to the batcher, and the news of its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch

from llava_core.language.sampling import Sampling

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Picture:
    """Visual tokens [1, T, hidden], and the name by which the same picture is known again."""

    key: bytes
    visual: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """News of an answer; the last has `finish` or `error`."""

    text: str
    finish: Finish | None = None
    error: str | None = None


STOPPING = Piece("", error="the server is stopping")


@dataclasses.dataclass(eq=False)
class Job:
    """One question."""

    ids: list[int]
    """The prompt, without the picture."""
    picture: Picture | None
    sampling: Sampling
    tell: Callable[[Piece], None]
    """Called from the batcher's thread; must not block."""
    cancelled: bool = False
    """Nobody wants to hear more of it."""
    reused: int = 0
    """Tokens of the prompt that were in the cache already."""
    tokens: int = 0
    """Tokens said so far."""

    def hear(self, piece: Piece) -> None:
        if not self.cancelled:
            self.tell(piece)

    @property
    def visual_tokens(self) -> int:
        return 0 if self.picture is None else self.picture.visual.shape[1]

    @property
    def prompt_tokens(self) -> int:
        return self.visual_tokens + len(self.ids)
