"""Decode: image files to the pixels that the encoder takes."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Sequence, Set
from concurrent.futures import Executor

from extract.deduplicate import Deduplicator
from extract.pipeline_config import PipelineConfig
from extract.row_job import ImageJob, JobSink, RowJob, RowRef
from extract.stages.metrics import StageMetrics
from llava_core.network.async_tasks import together
from llava_core.network.rate_limit import ByteBudget
from llava_core.row_status import Status
from llava_core.shards.byte_offsets import THUMBNAIL_BYTES
from llava_core.vision.image_formats import ImageError
from llava_core.vision.preprocess import Decoded, Preprocess


@dataclasses.dataclass(frozen=True)
class EncoderInput:
    """What one encoder takes: the pixels of images, for the rows of its caches."""

    preprocess: Preprocess
    caches: Set[str]
    """Fingerprints of its caches."""
    out: JobSink[ImageJob]

    def rows(self, job: ImageJob) -> list[RowJob]:
        """The rows of its caches."""
        return [row for row in job.rows if row.shard.cache.fingerprint in self.caches]


class Decode:
    """Decoded images go to the encoders; rows that failed, and duplicates, go straight to `outcomes`."""

    def __init__(
        self,
        encoders: Sequence[EncoderInput],
        outcomes: JobSink[RowJob],
        threads: Executor,
        config: PipelineConfig,
        memory: ByteBudget,
        deduplicator: Deduplicator | None,
    ) -> None:
        """`memory`: budget from which image files are released. Without `deduplicator` all are decoded."""
        self.inbox: asyncio.Queue[ImageJob | None] = asyncio.Queue(4 * config.concurrency)
        self.encoders, self.outcomes = encoders, outcomes
        self.threads, self.config = threads, config
        self.memory, self.deduplicator = memory, deduplicator
        self.metrics = StageMetrics("decode", config.decode_threads, self.inbox.qsize)

    async def run(self) -> None:
        await together(self._worker() for _ in range(2 * self.config.decode_threads))
        for encoder in self.encoders:
            await encoder.out.put(None)

    async def _worker(self) -> None:
        loop = asyncio.get_running_loop()
        while (job := await self.inbox.get()) is not None:
            decoded: list[tuple[EncoderInput, ImageJob]] = []
            try:
                if job.rows[0].record.status is Status.OK:
                    decoded = await loop.run_in_executor(self.threads, self._decode, job)
            finally:
                self.memory.release(len(job.body))
            ended = {id(row): row for row in job.rows}
            for encoder, image in decoded:
                for row in image.rows:
                    del ended[id(row)]
                await encoder.out.put(image)
            for row in ended.values():
                await self.outcomes.put(row)
        await self.inbox.put(None)  # for the next worker

    def _decode(self, job: ImageJob) -> list[tuple[EncoderInput, ImageJob]]:
        """The pixels for each encoder, decoded once for those that take the same, and the rows they are for.

        A row that is in none of these has got its status, or the row that it duplicates.
        """
        jobs, decoded = [], dict[Preprocess, Decoded | ImageError]()
        with self.metrics.work():
            sha256 = hashlib.sha256(job.body).digest()
            for row in job.rows:
                row.record.sha256 = sha256
                row.shard.take_file(row.record, job.body)
            for encoder in self.encoders:
                rows = [row for row in encoder.rows(job) if not self._duplicates(row, sha256)]
                own = encoder.preprocess  # the mean is also the colour of padding
                same = dataclasses.replace(own, mean=own.mean if own.crop == "pad" else (), std=())
                if rows and same not in decoded:
                    decoded[same] = self._pixels(job.body, same)
                for row in rows:
                    self._describe(row, same, decoded[same])
                if rows and isinstance(image := decoded[same], Decoded):
                    jobs.append((encoder, ImageJob(rows, pixels=image.pixels)))
        return jobs

    def _duplicates(self, job: RowJob, sha256: bytes) -> bool:
        if self.deduplicator is not None:
            job.duplicate_of = self.deduplicator.claim(sha256, RowRef(job.shard, job.record.row))
        return job.duplicate_of is not None

    def _pixels(self, body: bytes, preprocess: Preprocess) -> Decoded | ImageError:
        try:
            return preprocess.decode_image(body, self.config.max_pixels, self.config.accept_truncated)
        except ImageError as error:
            return error

    def _describe(self, job: RowJob, preprocess: Preprocess, image: Decoded | ImageError) -> None:
        """Record what a row keeps of its image."""
        record = job.record
        if isinstance(image, ImageError):
            record.status, record.reason = image.status, str(image)
            return
        record.reason, record.orig_hw = image.lacks, image.orig_hw
        if job.shard.thumbnails:
            record.thumbnail = preprocess.thumbnail(image, THUMBNAIL_BYTES)
