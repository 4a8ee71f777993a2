"""How many trials train together, from rates that are given here."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.sweep.config import SweepConfig
from train.sweep.space import Space
from train.sweep.together import fastest, why_alone


@pytest.mark.parametrize(
    ("gains", "most", "number", "times"),
    [
        ({}, 1, 1, 1),
        ({(1, 2): 1.04}, 16, 1, 1),  # within the noise
        ({(1, 2): 1.5, (2, 4): 1.07}, 16, 2, 1.5),
        ({(1, 2): 1.5, (2, 4): 1.2, (4, 8): 0}, 16, 4, 1.8),  # 8 do not fit
        ({(1, 2): 1.5, (2, 3): 1.2}, 3, 3, 1.8),
    ],
)
def test_doubled_for_as_long_as_it_pays(
    gains: dict[tuple[int, int], float], most: int, number: int, times: float
) -> None:
    asked: list[tuple[int, int]] = []

    def gain(few: int, more: int) -> float:
        asked.append((few, more))
        return gains[few, more]

    assert fastest(gain, most) == pytest.approx((number, times))
    assert asked == list(gains)


@pytest.mark.parametrize(
    ("space", "flags", "why"),
    [
        ("lr=1,2", {}, ""),
        ("lr=1,2", {"together": 1, "tune": "lora"}, ""),
        ("lr=1,2", {"tune": "lora"}, "a language model of its own"),
        ("batch_size=1,2", {}, "batch_size changes what a step reads"),
        ("lr=1..2", {"trials": 3}, "one by one"),
        ("lr=1..2", {"trials": 3, "together": 2}, ""),
        ("lr=1,2", {"prune": "median"}, "one by one"),
    ],
)
def test_what_nothing_is_measured_for(space: str, flags: dict[str, object], why: str) -> None:
    given = {"together": "auto", **flags}
    where = {name: Path(name) for name in ("features", "llm", "eval_features", "out")}
    config = SweepConfig(**where, space=(space,), **given)  # type: ignore[arg-type]
    told = why_alone(config, Space.of((space,), config))
    assert why in told
    assert bool(why) == bool(told)
