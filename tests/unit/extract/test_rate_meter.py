"""The rate of a stage, stragglers aside."""

from __future__ import annotations

from extract.bench.measure import RateMeter
from llava_core.cli.console import progress


def meter_of(times: list[float]) -> RateMeter:
    meter = RateMeter(progress(None, "rows"))
    meter.times = times
    return meter


def test_a_straggler_does_not_set_the_rate() -> None:
    steady = [i / 10 for i in range(1, 101)]
    assert meter_of(steady).rate == 10
    assert meter_of([*steady[:-1], 99.0]).rate == 10


def test_rows_that_come_in_batches_count_in_full() -> None:
    assert meter_of([1.0] * 8 + [2.0] * 8).rate == 8
    assert meter_of([1.0]).rate == 1
    assert meter_of([]).rate == 0
