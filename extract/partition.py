"""This worker's part of the files and of the limits, when a launcher has started several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from extract.config import EncodeConfig
from llava_core.launcher_variables import WorkerIndex

T = TypeVar("T")
Flags = TypeVar("Flags", bound=EncodeConfig)


def partition(things: Sequence[T], worker: WorkerIndex) -> list[T]:
    """Every `world_size`-th item from `rank` on: each belongs to exactly one worker."""
    return list(things[worker.rank :: worker.world_size])


def limits_of(config: Flags, worker: WorkerIndex) -> Flags:
    """The flags with this worker's part of the limits per host."""
    rate = config.host_rate and config.host_rate / worker.world_size
    return dataclasses.replace(config, per_host=max(1, config.per_host // worker.world_size), host_rate=rate)
