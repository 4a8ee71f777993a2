"""Encode: pixels to features, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
import torch

from extract.row_job import ImageJob, JobSink, RowJob
from extract.stages.decode import EncoderInput
from extract.stages.metrics import StageMetrics
from llava_core.device import is_memory_full
from llava_core.errors import LlavaError, first_line
from llava_core.network.async_tasks import time_limit
from llava_core.row_status import Status
from llava_core.vision.tower import VisionTower, encode_layers

FULL_BATCH_WAIT = 0.05
"""Seconds that an image waits for others to fill its batch."""


class Encode:
    """Puts every row to `out` with its features, or with the status that they are not finite.

    `towers` are one network at several layers, which runs once for all of them.
    """

    def __init__(
        self,
        out: JobSink[RowJob],
        towers: Sequence[VisionTower],
        thread: Executor,
        batch_size: int,
        name: str = "encode",
    ) -> None:
        self.inbox: asyncio.Queue[ImageJob | None] = asyncio.Queue(2 * batch_size)
        self.out, self.thread, self.batch_size = out, thread, batch_size
        self.towers = {tower.identity.fingerprint: tower for tower in towers}
        self.metrics = StageMetrics(name, 1, self.inbox.qsize)

    @property
    def takes(self) -> EncoderInput:
        """What it is to get of each image."""
        return EncoderInput(next(iter(self.towers.values())).preprocess, self.towers.keys(), self.inbox)

    async def run(self) -> None:
        loop, last = asyncio.get_running_loop(), False
        while not last:
            job = await self.inbox.get()
            batch: list[ImageJob] = []
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
                    for row in encoded.rows:
                        await self.out.put(row)

    def _encode(self, batch: Sequence[ImageJob]) -> None:
        with self.metrics.work():
            pixels = torch.from_numpy(np.stack([job.pixels for job in batch if job.pixels is not None]))
            towers = list(self.towers.values())
            try:
                layers = encode_layers(towers, pixels)
            except RuntimeError as error:
                if not is_memory_full(error):
                    raise
                what, got = f"the memory is full: {towers[0].name}", first_line(error)
                raise LlavaError(what, got=got, do="lower --batch-size") from None
            for fingerprint, layer in zip(self.towers, layers, strict=True):
                features = layer.half()
                finite = features.isfinite().flatten(1).all(1).tolist()
                for job, encoded, is_finite in zip(batch, features.cpu().numpy(), finite, strict=True):
                    for row in job.rows:
                        if row.shard.cache.fingerprint != fingerprint:
                            continue
                        if is_finite:
                            row.record.features = encoded
                        else:
                            row.record.status = Status.NOT_FINITE
