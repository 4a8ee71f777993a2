"""Intervals: as wide as theory says, over pictures and not over rows, and the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from llava_core import bootstrap
from llava_core.bootstrap import by_picture, figure_rows, interval, redrawn, with_interval


def of_means(values: np.ndarray, pictures: list[int]) -> tuple[float, float]:
    sums, rows = redrawn(by_picture(np.stack([values, np.ones_like(values)], 1), pictures)).T
    low, high = interval("mean", sums / rows).values()
    return low, high


def test_the_interval_of_a_mean_is_that_of_the_textbook() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = of_means(values, list(range(400)))
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_rows_of_one_picture_make_nothing_surer(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=40)
    alone = of_means(values, list(range(40)))
    assert of_means(values.repeat(5), [k for k in range(40) for _ in range(5)]) == pytest.approx(alone)
    monkeypatch.setattr(bootstrap, "MOST_COUNTS", 40 * 7)  # in blocks that do not divide the draws
    assert of_means(values, list(range(40))) == pytest.approx(alone)


def test_figures_are_shown_with_their_intervals() -> None:
    figures = {"loss": 0.5, "loss_low": 0.4, "loss_high": 0.61, "gap": None, "gap_low": None, "rows": 1200}
    assert with_interval(figures, "loss", 2) == "0.50 (0.40 to 0.61)"
    assert figure_rows(figures) == [("loss", "0.5000 (0.4000 to 0.6100)"), ("gap", "-"), ("rows", "1,200")]
    assert with_interval({"loss": 0.5}, "loss") == "0.5000"  # of a file written before there were intervals
