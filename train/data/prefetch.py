"""Batches ahead of time: threads read shards and tokenise text while the model computes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from llava_core.errors import LlavaError
from train.data.samples import Batch, Samples, TextCounts
from train.data.schedule import Schedule
from train.distributed import ProcessGroup

AHEAD = 4
"""Batches in flight."""
THREADS = 2


def prefetch(
    samples: Samples, schedule: Schedule, steps: range, pin: bool, group: ProcessGroup
) -> Generator[Batch, None, None]:
    """This rank's shard of each of the `steps`, in order; `pin` pins features on the CPU.

    A batch that cannot be read has its `error` instead of samples, for the other ranks to learn of it.
    """

    def load(step: int) -> Batch:
        epochs, indices = schedule.at(step)
        own = group.shard(range(len(indices)), lambda k: samples.weight(indices[k]))
        try:
            batch = samples.batch([indices[k] for k in own], [epochs[k] for k in own])
        except (LlavaError, OSError) as error:
            return Batch(torch.empty(0), [], TextCounts.of([]), error)
        if pin and not batch.features.is_cuda:
            batch = dataclasses.replace(batch, features=batch.features.pin_memory())
        return batch

    with ThreadPoolExecutor(THREADS, "loader") as pool:
        ahead: collections.deque[Future[Batch]] = collections.deque()
        try:
            for step in steps:
                ahead.append(pool.submit(load, step))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
