"""Decode: image files to the pixels that the encoder takes."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Executor

from extract.config import PipelineConfig
from extract.deduplicate import Deduplicator
from extract.row_job import JobSink, RowJob, RowRef
from extract.stages.metrics import StageMetrics
from llava_core.network.async_tasks import together
from llava_core.network.rate_limit import ByteBudget
from llava_core.row_status import Status
from llava_core.shards.byte_offsets import THUMBNAIL_BYTES
from llava_core.vision.image_formats import ImageError
from llava_core.vision.preprocess import Preprocess


class Decode:
    """Decoded rows go to `out`; failed ones, and duplicates, go straight to `outcomes`."""

    def __init__(
        self,
        out: JobSink,
        outcomes: JobSink,
        preprocess: Preprocess,
        threads: Executor,
        config: PipelineConfig,
        memory: ByteBudget,
        deduplicator: Deduplicator | None,
    ) -> None:
        """`memory`: budget from which image files are released. Without `deduplicator` all are decoded."""
        self.inbox: asyncio.Queue[RowJob | None] = asyncio.Queue(4 * config.concurrency)
        self.out, self.outcomes = out, outcomes
        self.preprocess, self.threads, self.config = preprocess, threads, config
        self.memory, self.deduplicator = memory, deduplicator
        self.metrics = StageMetrics("decode", config.decode_threads, self.inbox.qsize)

    async def run(self) -> None:
        await together(self._worker() for _ in range(2 * self.config.decode_threads))
        await self.out.put(None)

    async def _worker(self) -> None:
        loop = asyncio.get_running_loop()
        while (job := await self.inbox.get()) is not None:
            try:
                if job.record.status is Status.OK:
                    await loop.run_in_executor(self.threads, self._decode, job)
            finally:
                self.memory.release(len(job.body))
            job.body = b""
            await (self.outcomes if job.pixels is None else self.out).put(job)
        await self.inbox.put(None)  # for the next worker

    def _decode(self, job: RowJob) -> None:
        """Set the job's pixels; if it has none, its status, or the row that it duplicates."""
        record = job.record
        with self.metrics.work():
            record.sha256 = hashlib.sha256(job.body).digest()
            if self.deduplicator is not None:
                job.duplicate_of = self.deduplicator.claim(record.sha256, RowRef(job.shard, record.row))
                if job.duplicate_of is not None:
                    return
            try:
                decoded = self.preprocess.decode_image(
                    job.body, self.config.max_pixels, self.config.accept_truncated
                )
            except ImageError as error:
                record.status, record.reason = error.status, str(error)
                return
            record.reason = decoded.lacks
            record.orig_hw = decoded.orig_hw
            if job.shard.writer.layout.thumbnails:
                record.thumbnail = self.preprocess.thumbnail(decoded, THUMBNAIL_BYTES)
            job.pixels = decoded.pixels
