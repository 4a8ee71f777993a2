"""A measured row, and how it is measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure: the median of `passes`, with what was predicted for an H100 before it was measured."""

    name: str
    value: float | str | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    passes: int = 1
    predicted: str = ""
    note: str = ""


def row(name: str, values: Sequence[float], unit: str, predicted: str = "", note: str = "") -> Row:
    """The median of some passes, with the least and the greatest."""
    middle = statistics.median(values)
    return Row(name, middle, unit, min(values), max(values), len(values), predicted, note)


class Clock:
    """The time that a section has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, call: Callable[[], object], times: int = 1) -> float:
    """Seconds of one of `times` calls, until the device has finished them."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        call()
    synchronise(device)
    return (time.perf_counter() - began) / times


def in_turns(
    kinds: Mapping[str, Callable[[], float]], seconds: float, most: int = 7
) -> dict[str, list[float]]:
    """A B C A B C …: each kind at least once, again while `seconds` last, at most `most` times."""
    clock = Clock(seconds)
    measured: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(most):
        for name, measure in kinds.items():
            measured[name].append(measure())
        if clock.left < 0:
            break
    return measured


def median_of(
    device: torch.device, call: Callable[[], object], seconds: float, times: int = 1
) -> list[float]:
    """Seconds of one call, in several passes after one that warms up."""
    seconds_of(device, call)
    return in_turns({"": lambda: seconds_of(device, call, times)}, seconds)[""]
