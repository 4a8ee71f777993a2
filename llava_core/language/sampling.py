"""Sampling parameters: temperature, top-k, top-p, repetition penalty, stop texts, length."""

from __future__ import annotations

import dataclasses

from llava_core.errors import LlavaError

MAX_TEMPERATURE = 100
PENALTIES = (0.01, 100)
"""Range of the repetition penalty. Outside it, or below MIN_TEMPERATURE, logits in fp32 become nan or inf."""
MIN_TEMPERATURE = 1e-3
"""Temperatures between 0 and this are raised to it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens of an answer are chosen, and where it ends; greedy by default."""

    max_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token; higher is more varied."""
    top_k: int = 0
    """Sample among so many of the likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that share this much of the probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that the answer already has less likely."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""

    def __post_init__(self) -> None:
        """Raises LlavaError (wrong usage) for a number out of its range."""
        self._require(self.max_tokens > 0, "max_tokens", "a number above 0")
        self._require(0 <= self.temperature <= MAX_TEMPERATURE, "temperature", f"0 to {MAX_TEMPERATURE}")
        self._require(self.top_k >= 0, "top_k", "0 or more")
        self._require(0 < self.top_p <= 1, "top_p", "above 0, up to 1")
        low, high = PENALTIES
        self._require(low <= self.repetition_penalty <= high, "repetition_penalty", f"{low} to {high}")
        self._require(-(1 << 63) <= self.seed < 1 << 63, "seed", "a whole number of 64 bits")
        self._require(all(self.stop), "stop", "texts that are not empty")

    def _require(self, fits: bool, name: str, expected: str) -> None:
        if not fits:
            got = getattr(self, name)
            # A flag is named as it is typed; Sampling itself is set by /set or by clients of the server.
            known = name if type(self) is Sampling else f"--{name.replace('_', '-')}"
            raise LlavaError(known, expected=expected, got=got, exit_code=2)


def sampling_of(flags: Sampling) -> Sampling:
    """The sampling parameters among other flags."""
    return Sampling(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Sampling)})
