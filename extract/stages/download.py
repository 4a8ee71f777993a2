"""Download: image files from the network, or from the disk where the source has them."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from extract.open_output import OpenOutput
from extract.pipeline_config import PipelineConfig
from extract.row_job import ImageJob, JobSink, RowJob, RowRef
from extract.stages.host_queue import HostQueue
from llava_core.network.async_tasks import together
from llava_core.network.fetch import Fetched, Fetcher
from llava_core.shards.writer import RowRecord

WAITING_ROWS = 2048
"""Rows that wait for their host, a slot or a retry, besides those under way."""


class Download:
    """Puts every image to `out`, with its file, or its rows have the status that says why there is none.

    The bytes of a file count as in memory until they are released from the fetcher's budget.
    """

    def __init__(
        self, out: JobSink[ImageJob], fetcher: Fetcher, threads: Executor, config: PipelineConfig
    ) -> None:
        # Rows between two attempts, or whose failure is not confirmed yet, do not keep their host idle.
        self.inbox: HostQueue[tuple[RowRef, ...]] = HostQueue(2 * config.per_host)
        self.out, self.fetcher, self.threads, self.config = out, fetcher, threads, config
        self.name = "read"
        """Name for the terminal: `download` once any image is."""
        self._reads = asyncio.Semaphore(config.decode_threads)

    async def run(self) -> None:
        await together(self._worker() for _ in range(self.config.concurrency + WAITING_ROWS))
        await self.out.put(None)

    async def _worker(self) -> None:
        while (taken := await self.inbox.get()) is not None:
            host, refs = taken
            shard, row = refs[0]
            if host is not None:
                self.name = "download"
            try:
                fetched = await self._read(shard, row) or await self.fetcher.fetch(shard.urls[row])
            finally:
                self.inbox.done(host)
            rows = [RowJob(shard, _record(row, fetched)) for shard, row in refs]
            await self.out.put(ImageJob(rows, fetched.body))

    async def _read(self, shard: OpenOutput, row: int) -> Fetched | None:
        """An image that needs no network; None for one at an address."""
        if shard.images is None:
            return None
        loop, memory = asyncio.get_running_loop(), self.fetcher.memory
        async with self._reads:
            await memory.room()
            image = await loop.run_in_executor(self.threads, shard.images.load, row, self.config.max_bytes)
            if image:
                memory.hold(len(image.body))
        return image


def _record(row: int, fetched: Fetched) -> RowRecord:
    record = RowRecord(row, fetched.status, None, fetched.http, fetched.attempts, len(fetched.body))
    record.mtime, record.reason = fetched.mtime, fetched.detail
    return record
