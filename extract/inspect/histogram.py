"""Histograms whose edges read well, for the terminal and for the page of `extract inspect`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from llava_core.types import JsonDict

EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values lie in bins of one width."""

    start: float
    step: float
    counts: tuple[int, ...]
    whole: bool
    """The values are whole numbers."""
    open: bool
    """The last bin also counts everything above it."""

    @property
    def edges(self) -> list[float]:
        """Edges of the bins, ascending, one more than there are bins."""
        return [float(f"{self.start + k * self.step:.10g}") for k in range(len(self.counts) + 1)]

    @property
    def labels(self) -> list[str]:
        """Label of a bin: '20–39' for whole numbers, '1.5–2.0' for others, '≥ 480' for one that is open."""
        edges = [self.edge_text(k) for k in range(len(self.edges))]
        last = [f"{edge - 1:.0f}" for edge in self.edges] if self.whole else edges
        labels = [low if low == up else f"{low}–{up}" for low, up in zip(edges, last[1:], strict=False)]
        return labels[:-1] + [f"≥ {edges[-2]}" if self.open else labels[-1]]

    def edge_text(self, k: int) -> str:
        """Edge `k` with the decimals that the width of a bin asks for."""
        return f"{self.edges[k]:.{max(0, -math.floor(math.log10(self.step) + 1e-9))}f}"

    def to_json(self) -> JsonDict:
        return {"edges": self.edges, "counts": list(self.counts), "last_is_open": self.open}


def histogram(values: np.ndarray, bins: int, whole: bool = False) -> Histogram | None:
    """At most `bins` + 1 bins of a width such as 0.5, 1, 2 or 10; None of no values.

    A long tail, the last 1 % of the values on more than half of the range, goes into an open last bin.
    """
    if not len(values):
        return None
    low, most, high = (float(q) for q in np.percentile(values, (0, 99, 100)))
    if tail := high - low > 2 * (most - low) > 0:
        high = most
    span = max(high - low, 1e-3 * abs(high)) or 1.0  # of values all but equal, a bin or two
    step = _reads_well(span / bins)
    if whole:
        step = max(1.0, step)
    start = math.floor(low / step) * step
    last = math.floor((high - start) / step + 1e-9)
    places = np.clip(((values - start) / step + 1e-9).astype(np.int64), 0, last)
    return Histogram(start, step, tuple(np.bincount(places, minlength=last + 1).tolist()), whole, tail)


def _reads_well(step: float) -> float:
    """The next of 1, 2, 5, 10, … times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def bar(share: float, columns: int) -> str:
    """A bar of up to `columns` columns, in eighths; any share above 0 is visible."""
    eighths = max(round(share * columns * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + EIGHTHS[rest].strip()
