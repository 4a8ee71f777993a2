"""Write: outcomes of rows to their shards, durable a batch at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from extract.deduplicate import Deduplicator
from extract.open_output import OpenOutput
from extract.open_shard import OpenShard
from extract.row_job import InFlightRow, RowJob, RowRef
from extract.stages.metrics import ProgressBar, StageMetrics
from llava_core.errors import LlavaError
from llava_core.network.async_tasks import time_limit
from llava_core.shards.reader import Shard

OPEN_SHARDS = 4
"""Shards of a cache that are open at a time, so that the last rows of one keep no other stage idle."""
WRITE_ROWS = 128
"""Rows of a shard that are made durable together."""
WRITE_SECONDS = 5.0
"""Seconds that an outcome waits for others, at most."""


class Write:
    """Owns the open shards. A duplicate gets the outcome of its original, now or when that is known.

    `done` is called in the disk thread with each finished shard and the seconds it took.
    """

    def __init__(
        self,
        disk: Executor,
        bar: ProgressBar,
        done: Callable[[Shard, float], None],
        deduplicator: Deduplicator,
        shards: Sequence[OpenOutput] = (),
        outputs: int = 1,
    ) -> None:
        """`disk`: one thread. `shards`: shards that are open already; `open` opens the others."""
        self.inbox: asyncio.Queue[RowJob | None] = asyncio.Queue(4 * WRITE_ROWS)
        self.disk, self.bar, self.done, self.deduplicator = disk, bar, done, deduplicator
        self.metrics = StageMetrics("write", 1, self.inbox.qsize)
        self.shards = list(shards)
        """Shards that are open."""
        self.failed = 0
        """Rows that have failed so far."""
        self._slots = asyncio.Semaphore(OPEN_SHARDS * outputs)

    async def open(self, opener: Callable[[], OpenOutput]) -> OpenOutput:
        """Open a shard as soon as fewer than OPEN_SHARDS of a cache are open. Raises what `opener` raises."""
        await self._slots.acquire()
        try:
            shard = await asyncio.get_running_loop().run_in_executor(self.disk, self._open, opener)
        except BaseException:
            self._slots.release()
            raise
        self.bar.update(len(shard.urls) - shard.missing)
        return shard

    def _open(self, opener: Callable[[], OpenOutput]) -> OpenOutput:
        shard = opener()
        self.shards.append(shard)  # here, so that one opened during a cancellation is closed, too
        return shard

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        oldest: float | None = None
        more = True
        while more:
            wait = None if oldest is None else oldest + WRITE_SECONDS - loop.time()
            try:
                async with time_limit(wait):
                    job = await self.inbox.get()
            except asyncio.TimeoutError:
                pass
            else:
                more = job is not None
                if job is not None:
                    if not self._waits(job):
                        if job.duplicate_of is not None:
                            await loop.run_in_executor(self.disk, self._copy_outcome, job)
                        self._take(job)
                    oldest = oldest or loop.time()
            if oldest is not None and loop.time() >= oldest + WRITE_SECONDS:
                ready, oldest = [shard for shard in self.shards if shard.waiting], None
            else:
                ready = [s for s in self.shards if s.waiting and len(s.waiting) >= min(WRITE_ROWS, s.missing)]
            for shard in ready:
                await self.write(shard)

    async def write(self, shard: OpenOutput) -> None:
        """Make the waiting outcomes of a shard durable. The last ones finish it."""
        await asyncio.get_running_loop().run_in_executor(self.disk, self._write, shard)
        if shard.missing == 0:
            self._slots.release()

    def flush(self) -> None:
        """Write what waits, outside the event loop, after the stages have been stopped.

        What cannot be written, as on a full disk, is left for the next run: the first error is what counts.
        """
        while not self.inbox.empty():
            if (job := self.inbox.get_nowait()) and not self._waits(job):
                with contextlib.suppress(OSError, LlavaError):
                    if job.duplicate_of is not None:
                        self._copy_outcome(job)
                    self._take(job)
        for shard in [shard for shard in self.shards if shard.waiting]:
            with contextlib.suppress(OSError, LlavaError):
                self._write(shard)

    def close(self) -> None:
        """Close the shards that are not finished."""
        for shard in self.shards:
            shard.close()

    def _waits(self, job: RowJob) -> bool:
        """Whether the job is a duplicate whose original has no outcome yet; then it joins the waiters."""
        original = job.duplicate_of
        if not isinstance(original, InFlightRow) or original.record is not None:
            return False
        original.waiters.append(job)
        return True

    def _copy_outcome(self, job: RowJob) -> None:
        assert job.duplicate_of is not None
        job.take_over(job.duplicate_of.outcome())

    def _take(self, job: RowJob) -> None:
        """Add an outcome to those of its shard, and to the rows that waited for it."""
        record = job.record
        job.shard.waiting.append(record)
        self.failed += record.status.failed
        self.bar.update()
        for waiter in self.deduplicator.settle(RowRef(job.shard, record.row), record):
            waiter.take_over(record)
            self._take(waiter)

    def _write(self, shard: OpenOutput) -> None:
        with self.metrics.work():
            shard.write()
        if shard.missing == 0:
            self.shards.remove(shard)
            if isinstance(shard, OpenShard):
                finished = Shard(shard.writer.path)
                self.deduplicator.add_finished(finished)  # before the open one goes, so that claims find it
                self.done(finished, time.monotonic() - shard.started)
            self.deduplicator.drop_open(shard)
