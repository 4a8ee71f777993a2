"""95 % confidence intervals of held-out metrics: percentile bootstrap (Efron and Tibshirani 1993, ch. 13).

Pictures, not rows, are resampled with replacement, since rows of one picture are alike. Resamples depend
on the number of pictures alone, so that metrics of the same pictures are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava_core.cli.translation import translated
from llava_core.types import JsonDict

DRAWS = 2000
MOST_COUNTS = 1 << 22
"""Most counts, of a picture in a resample, in memory at once."""


def by_picture(values: np.ndarray, pictures: Sequence[int]) -> np.ndarray:
    """Sum the rows [N, K] of each picture, numbered from 0: [pictures, K] in fp64."""
    sums = np.zeros((max(pictures) + 1, values.shape[1]))
    np.add.at(sums, np.asarray(pictures), values)
    return sums


def redrawn(sums: np.ndarray) -> np.ndarray:
    """Totals [DRAWS, K] of resamples of the pictures' sums [pictures, K], each of the same size."""
    n, random = len(sums), np.random.default_rng(0)
    totals = np.empty((DRAWS, sums.shape[1]))
    block = max(1, MOST_COUNTS // n)
    for start in range(0, DRAWS, block):
        size = min(block, DRAWS - start)
        drawn = random.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        totals[start : start + size] = counts.astype(float) @ sums
    return totals


def interval(name: str, draws: np.ndarray) -> JsonDict:
    """`name_low` and `name_high`: the 2.5th and 97.5th percentile of a metric's resampled values [DRAWS]."""
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return {f"{name}_low": low, f"{name}_high": high}


def with_interval(figures: Mapping[str, Any], name: str, digits: int = 4) -> str:
    """A figure as "0.1884 (0.1790 to 0.1980)"; without an interval the number alone, "-" without a number."""
    value, low, high = (figures.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.{digits}f}"
    return translated("{} ({} to {})").format(*(f"{each:.{digits}f}" for each in (value, low, high)))


def figure_names(figures: Mapping[str, Any]) -> list[str]:
    """Names of the figures, without the `_low` and `_high` of their intervals."""
    return [
        name
        for name in figures
        if not (name.endswith(("_low", "_high")) and name.rpartition("_")[0] in figures)
    ]


def figure_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of figures for a table, each with its interval, if it has one."""
    return [(name.replace("_", " "), _shown(figures, name)) for name in figure_names(figures)]


def _shown(figures: Mapping[str, Any], name: str) -> str:
    value = figures[name]
    if value is None or isinstance(value, float):
        return with_interval(figures, name)
    return f"{value:,}" if isinstance(value, int) else str(value)
