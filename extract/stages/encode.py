"""Encode: pixels to features, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch

from extract.row_job import JobSink, RowJob
from extract.stages.metrics import StageMetrics
from llava_core.network.async_tasks import time_limit
from llava_core.row_status import Status
from llava_core.vision.tower import VisionTower

FULL_BATCH_WAIT = 0.05
"""Seconds that an image waits for others to fill its batch."""


class Encode:
    """Puts every row to `out` with its features, or with the status that they are not finite."""

    def __init__(self, out: JobSink, tower: VisionTower, thread: Executor, batch_size: int) -> None:
        self.inbox: asyncio.Queue[RowJob | None] = asyncio.Queue(2 * batch_size)
        self.out, self.tower, self.thread, self.batch_size = out, tower, thread, batch_size
        self.metrics = StageMetrics("encode", 1, self.inbox.qsize)

    async def run(self) -> None:
        loop, last = asyncio.get_running_loop(), False
        while not last:
            job = await self.inbox.get()
            batch: list[RowJob] = []
            deadline = loop.time() + FULL_BATCH_WAIT
            while job is not None:
                batch.append(job)
                if len(batch) == self.batch_size:
                    break
                try:
                    async with time_limit(deadline - loop.time()):
                        job = await self.inbox.get()
                except asyncio.TimeoutError:
                    break
            last = job is None
            if batch:
                await loop.run_in_executor(self.thread, self._encode, batch)
                for encoded in batch:
                    await self.out.put(encoded)
        await self.out.put(None)

    def _encode(self, batch: Sequence[RowJob]) -> None:
        with self.metrics.work():
            pixels = torch.from_numpy(np.stack([job.pixels for job in batch if job.pixels is not None]))
            features = self.tower.encode(pixels).half()
            finite = features.isfinite().flatten(1).all(1).tolist()
            for job, row, is_finite in zip(batch, features.cpu().numpy(), finite, strict=True):
                job.pixels = None
                if is_finite:
                    job.record.features = row
                else:
                    job.record.status = Status.NOT_FINITE
