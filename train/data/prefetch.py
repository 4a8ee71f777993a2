"""Batches ahead of time: threads read shards and tokenise text while the model computes."""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from llava_core.errors import LlavaError
from train.data.batch import Batch, TextCounts
from train.data.samples import Samples
from train.data.schedule import Schedule
from train.distributed import ProcessGroup

AHEAD = 8
"""Batches in flight."""
THREADS = 8
"""As many, so that storage that answers in 5 ms a row keeps up with a GPU's 30 ms a step of 16."""
Key = TypeVar("Key")
Item = TypeVar("Item")


def training_batches(
    samples: Samples, schedule: Schedule, steps: range, pin: bool, group: ProcessGroup
) -> Generator[Batch, None, None]:
    """This rank's shard of each of the `steps`, read ahead; `pin` pins features on the CPU.

    A batch that cannot be read has its `error` instead of samples, for the other ranks to learn of it.
    """

    def load(step: int) -> Batch:
        epochs, indices = schedule.at(step)
        own = group.shard(range(len(indices)), lambda k: samples.weight(indices[k]))
        try:
            batch = samples.batch([indices[k] for k in own], [epochs[k] for k in own])
        except (LlavaError, OSError) as error:
            return Batch(torch.empty(0), [], TextCounts.of([]), error)
        return batch.pinned() if pin else batch

    return prefetch(load, steps)


def prefetch(load: Callable[[Key], Item], keys: Iterable[Key]) -> Generator[Item, None, None]:
    """What `load` gives for each key, in order. Raises what it raises."""
    with ThreadPoolExecutor(THREADS, "loader") as pool:
        ahead: collections.deque[Future[Item]] = collections.deque()
        try:
            for key in keys:
                ahead.append(pool.submit(load, key))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
