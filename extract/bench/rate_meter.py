"""Rate of a stage, stragglers aside."""

from __future__ import annotations

import time

from extract.stages.metrics import ProgressBar

STEADY = 0.9
"""Share of the rows from which on a rate counts: the last ones may wait long for a slow host, which holds
nobody up in a long run."""


class RateMeter:
    """A progress bar that records when each row came."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.began = time.monotonic()
        self.times: list[float] = []
        """Seconds from the beginning to each row."""

    def update(self, n: int = 1) -> None:
        self.times += [time.monotonic() - self.began] * n
        self.bar.update(n)

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self.bar.set_postfix_str(s, refresh)

    @property
    def rate(self) -> float:
        """Rows a second: the best rate over the first 90 % of the rows or more; 0 without any."""
        least = max(1, int(STEADY * len(self.times)))
        return max((n / max(self.times[n - 1], 1e-9) for n in range(least, len(self.times) + 1)), default=0.0)
