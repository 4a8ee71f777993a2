"""How many trials train together, from rates that are given here."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.config import SweepConfig
from train.sweep.space import Space
from train.sweep.together import fastest, why_alone


@pytest.mark.parametrize(
    ("rates", "most", "number", "gain"),
    [
        ({1: 100}, 1, 1, 1),
        ({1: 100, 2: 104}, 16, 1, 1),  # within the noise
        ({1: 100, 2: 150, 4: 160}, 16, 2, 1.5),
        ({1: 100, 2: 150, 4: 200, 8: 0}, 16, 4, 2),  # 8 do not fit
        ({1: 100, 2: 150, 3: 180}, 3, 3, 1.8),
    ],
)
def test_doubled_for_as_long_as_it_pays(rates: dict[int, float], most: int, number: int, gain: float) -> None:
    asked: list[int] = []

    def rate(runs: int) -> float:
        asked.append(runs)
        return rates[runs]

    assert fastest(rate, most) == (number, gain)
    assert asked == list(rates)


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
