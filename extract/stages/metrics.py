"""How busy each stage is, and so which one bounds the pipeline."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from llava_core.types import JsonDict

BUSY = 0.7
"""Share of its time above which a stage is the bottleneck."""
LATEST = 5.0
"""Seconds over which the current bottleneck is measured."""


class ProgressBar(Protocol):
    """What the stages need of tqdm's bar."""

    def update(self, n: int = 1) -> object: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> None: ...


class StageMetrics:
    """One stage: seconds that its workers have worked, and the rows that wait before it."""

    def __init__(self, name: str, workers: int, queue_length: Callable[[], int]) -> None:
        self.name, self.workers, self.queue_length = name, workers, queue_length
        self.seconds = 0.0
        """Seconds of work, summed over the workers."""
        self.waiting = 0.0
        """Mean number of rows before it."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Context of a piece of work, in any thread."""
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began


class Bottleneck:
    """Finds the stage that bounds the others: the busiest, or, if none is busy, the source of the images."""

    def __init__(self, stages: Sequence[StageMetrics], source: Callable[[], str]) -> None:
        """`source`: whether images are read or downloaded."""
        self.stages, self.source = stages, source
        self._began = self._mark_time = time.monotonic()
        self._mark = [0.0] * len(stages)
        self._samples = 0
        self.now = source()
        """The bottleneck of the last few seconds."""

    def sample(self) -> None:
        """Measure once; call it at even intervals."""
        self._samples += 1
        for stage in self.stages:
            stage.waiting += (stage.queue_length() - stage.waiting) / self._samples
        elapsed = time.monotonic() - self._mark_time
        if elapsed >= LATEST:
            self.now = self._busiest(self._busy(self._mark, elapsed))
            self._mark = [stage.seconds for stage in self.stages]
            self._mark_time = time.monotonic()

    def figures(self) -> JsonDict:
        """bottleneck; stages {name: {busy: share of the time, waiting: mean rows before it}}."""
        busy = self._busy([0.0] * len(self.stages), max(time.monotonic() - self._began, 1e-9))
        stages = {
            stage.name: {"busy": round(busy[stage.name], 3), "waiting": round(stage.waiting, 1)}
            for stage in self.stages
        }
        return {"bottleneck": self._busiest(busy), "stages": stages}

    def _busy(self, before: Sequence[float], elapsed: float) -> dict[str, float]:
        return {
            s.name: (s.seconds - b) / elapsed / s.workers for s, b in zip(self.stages, before, strict=True)
        }

    def _busiest(self, busy: dict[str, float]) -> str:
        name = max(busy, key=lambda stage: busy[stage])
        return name if busy[name] >= BUSY else self.source()
