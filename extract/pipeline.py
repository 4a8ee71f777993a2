"""Rows in flight: download → decode → encode → write, each stage at its own pace.

    shards ─ rows ─▶ downloads ─ pictures ─▶ encoder ─ outcomes ─▶ writer

Every arrow is a bounded queue, so memory stays bounded and the slowest stage sets the pace. Rows of the next
shard start while the last ones of this shard are still on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from extract.config import Encoding
from llava_core.console import say
from llava_core.device import cpu_cores
from llava_core.errors import LlavaError
from llava_core.fetch import Fetched, Fetcher, FetchLimits
from llava_core.preprocess import ImageError
from llava_core.shard_writer import FinishedMeanwhile, RowRecord, ShardWriter
from llava_core.status import Status
from llava_core.tasks import time_limit, together
from llava_core.vision import VisionTower

FULL_BATCH_WAIT = 0.05
"""Seconds a picture waits for others to fill its batch."""
WRITE_ROWS = 128
"""Rows of a shard that are made durable together."""
WRITE_SECONDS = 5.0
"""Longest time an outcome waits for that."""


class Filling:
    """A shard on its way: its writer, what is still to be done, what waits to be written."""

    def __init__(self, writer: ShardWriter, urls: Sequence[str], captions: Sequence[str | None]) -> None:
        self.writer, self.urls, self.captions = writer, urls, captions
        self.pending: list[int] = np.flatnonzero(~writer.done).tolist()
        self.missing = len(self.pending)
        self.waiting: list[RowRecord] = []
        self.started = time.monotonic()

    def write(self) -> None:
        """Make the waiting outcomes durable; the last ones finish the shard."""
        records, self.waiting = self.waiting, []
        if records:
            self.writer.write(records)
        self.missing -= len(records)
        if self.missing == 0:
            self.writer.finish()
            self.close()

    def close(self) -> None:
        self.writer.__exit__(None, None, None)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded row on its way to the encoder."""

    filling: Filling
    pixels: np.ndarray
    record: RowRecord


class Pipeline:
    """Runs shards through the stages; `finished` is called with each that is done, `bar` counts rows."""

    def __init__(
        self, tower: VisionTower, config: Encoding, bar: Any, finished: Callable[[Filling], None]
    ) -> None:
        self.tower, self.config, self.bar, self.finished = tower, config, bar, finished
        self.limits = FetchLimits(
            timeout=config.timeout,
            max_bytes=config.max_bytes,
            retries=config.retries,
            concurrency=config.concurrency,
            per_host=config.per_host,
            allow_private=config.allow_private,
            ignore_robots=config.ignore_robots,
            patience=config.patience,
        )
        self.failed = 0
        self.open: list[Filling] = []
        self.broken: LlavaError | OSError | None = None
        """Why a shard could not be opened."""

    def run(self, shards: Sequence[Callable[[], Filling]]) -> None:
        """Open the shards one after the other and fill them.

        Ctrl-C and SIGTERM end it with KeyboardInterrupt after everything encoded so far is on disk.
        """
        try:
            asyncio.run(self._run(shards))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for filling in self.open:
                filling.close()

    async def _run(self, shards: Sequence[Callable[[], Filling]]) -> None:
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, this.cancel)
        self.rows: asyncio.Queue[tuple[Filling, int] | None] = asyncio.Queue(self.config.concurrency)
        self.pictures: asyncio.Queue[Picture | None] = asyncio.Queue(2 * self.config.batch_size)
        self.outcomes: asyncio.Queue[tuple[Filling, RowRecord] | None] = asyncio.Queue(4 * WRITE_ROWS)
        try:
            with (
                ThreadPoolExecutor(self.config.decoders or cpu_cores(), "decode") as self.decoders,
                ThreadPoolExecutor(1, "encode") as self.encoder,
                ThreadPoolExecutor(1, "disk") as self.disk,
            ):
                stages = (self._feed(shards), self._download_all(), self._encode_all(), self._write_all())
                await together(stages)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                say("stopping; what is encoded is kept")
            with contextlib.suppress(OSError):  # a full disk is what the error already says
                self._keep_what_waits()
            raise
        if self.broken is not None:
            raise self.broken

    def _keep_what_waits(self) -> None:
        while not self.outcomes.empty():
            if item := self.outcomes.get_nowait():
                item[0].waiting.append(item[1])
        for filling in list(self.open):
            if filling.waiting:
                self._write(filling)

    async def _feed(self, shards: Sequence[Callable[[], Filling]]) -> None:
        loop = asyncio.get_running_loop()
        for open_shard in shards:
            try:
                filling = await loop.run_in_executor(self.disk, open_shard)
            except FinishedMeanwhile:
                continue
            except (LlavaError, OSError) as error:  # the shards that are open are to be finished first
                self.broken = error
                break
            self.open.append(filling)
            self.bar.update(len(filling.urls) - filling.missing)
            for row in filling.pending:
                await self.rows.put((filling, row))
            if not filling.pending:
                await loop.run_in_executor(self.disk, self._write, filling)
        for _ in range(self.config.concurrency):
            await self.rows.put(None)

    async def _download_all(self) -> None:
        async with Fetcher(self.limits) as fetcher:
            await together(self._download(fetcher) for _ in range(self.config.concurrency))
        await self.pictures.put(None)

    async def _download(self, fetcher: Fetcher) -> None:
        loop = asyncio.get_running_loop()
        while (item := await self.rows.get()) is not None:
            filling, row = item
            if filling.captions[row] is None:
                await self.outcomes.put((filling, RowRecord(row, Status.BAD_CAPTION)))
                continue
            fetched = await fetcher.fetch(filling.urls[row])
            picture, record = await loop.run_in_executor(self.decoders, self._decode, filling, row, fetched)
            if picture is None:
                await self.outcomes.put((filling, record))
            else:
                await self.pictures.put(picture)

    def _decode(self, filling: Filling, row: int, fetched: Fetched) -> tuple[Picture | None, RowRecord]:
        record = RowRecord(row, fetched.status, None, fetched.http, fetched.attempts, len(fetched.body))
        if fetched.status is not Status.OK:
            return None, record
        record.sha256 = hashlib.sha256(fetched.body).digest()
        try:
            decoded = self.tower.preprocess.decode_image(fetched.body, self.config.max_pixels)
        except ImageError as error:
            record.status = error.status
            return None, record
        record.orig_hw = decoded.orig_hw
        return Picture(filling, decoded.pixels, record), record

    async def _encode_all(self) -> None:
        loop, last = asyncio.get_running_loop(), False
        while not last:
            picture = await self.pictures.get()
            batch: list[Picture] = []
            deadline = loop.time() + FULL_BATCH_WAIT
            while picture is not None:
                batch.append(picture)
                if len(batch) == self.config.batch_size:
                    break
                try:
                    async with time_limit(deadline - loop.time()):
                        picture = await self.pictures.get()
                except asyncio.TimeoutError:
                    break
            last = picture is None
            if batch:
                await loop.run_in_executor(self.encoder, self._encode, batch)
                for picture_done in batch:
                    await self.outcomes.put((picture_done.filling, picture_done.record))
        await self.outcomes.put(None)

    def _encode(self, batch: Sequence[Picture]) -> None:
        """Fill in each picture's features, or that they are not finite."""
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
        features = self.tower.encode(pixels).half()
        finite = features.isfinite().flatten(1).all(1).tolist()
        for picture, row, fine in zip(batch, features.cpu().numpy(), finite, strict=True):
            if fine:
                picture.record.features = row
            else:
                picture.record.status = Status.NOT_FINITE

    async def _write_all(self) -> None:
        loop = asyncio.get_running_loop()
        oldest: float | None = None
        more = True
        while more:
            wait = None if oldest is None else oldest + WRITE_SECONDS - loop.time()
            try:
                async with time_limit(wait):
                    item = await self.outcomes.get()
            except asyncio.TimeoutError:
                ready, oldest = [filling for filling in self.open if filling.waiting], None
            else:
                more, ready = item is not None, []
                if item is not None:
                    filling, record = item
                    filling.waiting.append(record)
                    self._count(record)
                    oldest = oldest or loop.time()
                    if len(filling.waiting) in (WRITE_ROWS, filling.missing):
                        ready = [filling]
            for filling in ready:
                await loop.run_in_executor(self.disk, self._write, filling)

    def _count(self, record: RowRecord) -> None:
        self.failed += record.status is not Status.OK
        self.bar.update()
        if self.failed:
            self.bar.set_postfix_str(f"{self.failed} failed", refresh=False)

    def _write(self, filling: Filling) -> None:
        filling.write()
        if filling.missing == 0:
            self.open.remove(filling)
            self.finished(filling)
