"""Which part of the files is this worker's, when a launcher has started many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from extract.config import Encoding
from llava_core.launcher import WorkerIndex

T = TypeVar("T")
Flags = TypeVar("Flags", bound=Encoding)


def partition(things: Sequence[T], worker: WorkerIndex) -> list[T]:
    """Every `world_size`-th, so that no two workers meet on one and none is left out."""
    return list(things[worker.rank :: worker.world_size])


def limits_of(config: Flags, worker: WorkerIndex) -> Flags:
    """The same flags with this worker's part of what all together may ask of one host."""
    rate = config.host_rate and config.host_rate / worker.world_size
    return dataclasses.replace(config, per_host=max(1, config.per_host // worker.world_size), host_rate=rate)
