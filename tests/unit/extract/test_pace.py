"""What counts as the rate of a stage."""

from __future__ import annotations

from extract.alone import Pace
from llava_core.cli.console import progress


def pace_of(came: list[float]) -> Pace:
    pace = Pace(progress(None, "rows"))
    pace.came = came
    return pace


def test_a_straggler_does_not_set_the_rate() -> None:
    steady = [i / 10 for i in range(1, 101)]
    assert pace_of(steady).rate == 10
    assert pace_of([*steady[:-1], 99.0]).rate == 10


def test_rows_that_come_in_batches_count_in_full() -> None:
    assert pace_of([1.0] * 8 + [2.0] * 8).rate == 8
    assert pace_of([1.0]).rate == 1
    assert pace_of([]).rate == 0
