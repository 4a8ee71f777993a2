"""How busy each stage of the pipeline is, and so what bounds it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from llava_core.types import JsonDict

BUSY = 0.7
"""Share of its time above which a stage is what the others wait for."""
LATEST = 5.0
"""Seconds over which the bottleneck of the moment is told."""


class Gauge:
    """One stage: how long its workers have worked, and how much waits before it."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.seconds = 0.0
        """Of work, of all its workers together."""
        self.waiting = 0.0
        """Mean number of rows before it."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Around a piece of work, in any thread."""
        began = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began


class Gauges:
    """The stages whose work this machine does; what none of them bounds, getting the images does."""

    def __init__(self, **workers: int) -> None:
        self.stages = {name: Gauge(count) for name, count in workers.items()}
        self._began = self._mark_time = time.monotonic()
        self._mark = dict.fromkeys(workers, 0.0)
        self._samples = 0
        self.first = "read"
        """The stage before them; `download` once anything is."""
        self.now = self.first
        """The bottleneck of the last few seconds."""

    def __getitem__(self, name: str) -> Gauge:
        return self.stages[name]

    def sample(self, **waiting: int) -> None:
        """Look once; call it at even intervals."""
        self._samples += 1
        for name, rows in waiting.items():
            gauge = self.stages[name]
            gauge.waiting += (rows - gauge.waiting) / self._samples
        elapsed = time.monotonic() - self._mark_time
        if elapsed >= LATEST:
            self.now = self._busiest(
                {
                    name: (gauge.seconds - self._mark[name]) / elapsed / gauge.workers
                    for name, gauge in self.stages.items()
                }
            )
            self._mark = {name: gauge.seconds for name, gauge in self.stages.items()}
            self._mark_time = time.monotonic()

    def figures(self) -> JsonDict:
        """bottleneck; stages {name: {busy: share of the time, waiting: mean rows before it}}."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        busy = {name: gauge.seconds / elapsed / gauge.workers for name, gauge in self.stages.items()}
        stages = {
            name: {"busy": round(busy[name], 3), "waiting": round(gauge.waiting, 1)}
            for name, gauge in self.stages.items()
        }
        return {"bottleneck": self._busiest(busy), "stages": stages}

    def _busiest(self, busy: dict[str, float]) -> str:
        name = max(busy, key=lambda stage: busy[stage])
        return name if busy[name] >= BUSY else self.first
