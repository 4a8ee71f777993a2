from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.inspect.histogram import bar, histogram


def test_edges_read_well() -> None:
    shape = histogram(np.array([3, 17, 18, 44]), bins=10, whole=True)
    assert shape is not None
    assert shape.labels == [f"{k}–{k + 4}" for k in range(0, 45, 5)]
    assert shape.counts == (1, 0, 0, 2, 0, 0, 0, 0, 1)
    shape = histogram(np.array([9.84, 9.97, 10.26]), bins=5)
    assert shape is not None
    assert shape.labels == ["9.8–9.9", "9.9–10.0", "10.0–10.1", "10.1–10.2", "10.2–10.3"]
    assert shape.counts == (1, 1, 0, 0, 1)


def test_whole_numbers_get_no_bin_below_one() -> None:
    shape = histogram(np.array([4, 5, 5, 6]), bins=10, whole=True)
    assert shape is not None
    assert (shape.labels, shape.counts) == (["4", "5", "6"], (1, 2, 1))


def test_a_long_tail_goes_into_an_open_bin() -> None:
    shape = histogram(np.array([*range(1, 100), *[50] * 100, 10_000]), bins=10, whole=True)
    assert shape is not None
    assert shape.labels[-1] == "≥ 90"
    assert sum(shape.counts) == 200
    assert shape.counts[-1] == 11  # 90 to 99, and the one far out
    assert shape.to_json()["last_is_open"] is True


@pytest.mark.parametrize("value", [0.0, 27.5, -3.0, 1e-9])
def test_equal_values_make_one_bin(value: float) -> None:
    shape = histogram(np.full(7, value), bins=10)
    assert shape is not None
    assert shape.counts == (7,)


def test_no_values_make_none() -> None:
    assert histogram(np.zeros(0), bins=10) is None


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=200), st.integers(1, 30))
def test_every_value_lies_in_its_bin(values: list[float], bins: int) -> None:
    shape = histogram(np.array(values), bins)
    assert shape is not None
    assert sum(shape.counts) == len(values)
    assert len(shape.counts) <= bins + 1
    edges, slack = shape.edges, 1e-6 * shape.step
    below = 0
    for k, n in enumerate(shape.counts[:-1]):
        below += n
        upper = edges[k + 1]
        assert sum(v < upper - slack for v in values) <= below <= sum(v <= upper + slack for v in values)
    assert shape.open or max(values) <= edges[-1] + slack


def test_bars_are_drawn_by_eighths() -> None:
    assert [bar(share, 4) for share in (0, 1e-9, 0.5, 0.53125, 1)] == ["", "▏", "██", "██▏", "████"]
