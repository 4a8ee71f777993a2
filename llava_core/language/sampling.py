"""Sampling of answers: temperature, top-k, top-p, penalty, seed and stop texts, as flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from llava_core.errors import LlavaError

MAX_TEMPERATURE = 100
PENALTIES = (0.01, 100)
"""Beyond these, and below MIN_TEMPERATURE, logits overflow in fp32."""
MIN_TEMPERATURE = 1e-3
"""A temperature between 0 and this counts as this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen and where an answer ends; greedy by default."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "max_tokens temperature"}

    max_tokens: int = 256
    """Longest answer, in tokens; -1: as many as fit into the context."""
    temperature: float = 0.0
    """0 always takes the most probable token; higher is more varied."""
    top_k: int = 0
    """Sample among the K most probable tokens; 0 or -1: among all."""
    top_p: float = 1.0
    """Sample among the most probable tokens whose probabilities add up to this; 0: always the first."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the answer already has less probable."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it. An empty one ends none."""

    def __post_init__(self) -> None:
        """Raises LlavaError (wrong usage) for a number out of its range."""
        self._require(self.max_tokens > 0 or self.max_tokens == -1, "max_tokens", "a number above 0, or -1")
        self._require(0 <= self.temperature <= MAX_TEMPERATURE, "temperature", f"0 to {MAX_TEMPERATURE}")
        self._require(self.top_k >= -1, "top_k", "0 or more, or -1")
        self._require(0 <= self.top_p <= 1, "top_p", "0 to 1")
        low, high = PENALTIES
        self._require(low <= self.repetition_penalty <= high, "repetition_penalty", f"{low} to {high}")
        self._require(-(1 << 63) <= self.seed < 1 << 63, "seed", "a whole number of 64 bits")
        object.__setattr__(self, "stop", tuple(text for text in self.stop if text))

    def limit(self, room: int) -> int:
        """Most tokens of an answer that has room for `room` of them."""
        return room if self.max_tokens == -1 else min(self.max_tokens, room)

    def _require(self, fits: bool, name: str, expected: str) -> None:
        if not fits:
            got = getattr(self, name)
            # Flags are named as they are typed, the sampling alone as /set and a server's clients know it.
            known = name if type(self) is Sampling else f"--{name.replace('_', '-')}"
            raise LlavaError(known, expected=expected, got=got, exit_code=2)


def sampling_of(flags: Sampling) -> Sampling:
    """The sampling fields of a command's flags."""
    return Sampling(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Sampling)})
