"""Batches ahead of time: reading shards and tokenising text happen while the model computes."""

from __future__ import annotations

import collections
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

from train.data.samples import Batch, Samples, Schedule
from train.distributed import World

AHEAD = 4
"""Batches in flight."""
THREADS = 2


def prefetch(
    samples: Samples, schedule: Schedule, start: int, pin: bool, world: World
) -> Generator[Batch, None, None]:
    """This rank's part of the steps from `start` to the end, in order; `pin` pins features on the CPU."""

    def load(step: int) -> Batch:
        epoch, indices = schedule.at(step)
        batch = samples.batch(world.part(indices, samples.text_bytes), epoch)
        if pin and not batch.features.is_cuda:
            batch = Batch(batch.features.pin_memory(), batch.examples)
        return batch

    steps = iter(range(start, schedule.steps))
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
