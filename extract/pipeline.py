"""Rows in flight: download → decode → encode → write, each stage at its own pace.

    shards ─ rows by host ─▶ downloads ─ bodies ─▶ decoders ─ pictures ─▶ encoder ─ outcomes ─▶ writer

Every arrow is bounded, the bodies by their bytes: memory stays bounded, and the slowest stage sets the pace.
Rows of the next shards start while the last ones of this shard are still on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from extract.config import Stages
from extract.deduplicate import Duplicates, First, Known, Place
from extract.open_shard import Filling
from extract.stages.host_queue import HostQueues
from extract.stages.metrics import Gauges
from llava_core.cli.command import stop_signals
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.launcher import cpu_cores
from llava_core.network.async_tasks import _signals_restored, in_background, time_limit, together
from llava_core.network.fetch import Fetched, Fetcher
from llava_core.network.fetch_limits import FetchLimits
from llava_core.row_status import Status
from llava_core.shards.layout import THUMBNAIL_BYTES
from llava_core.shards.part_file import FinishedMeanwhile
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord
from llava_core.vision.preprocess import ImageError
from llava_core.vision.tower import VisionTower

OPEN_SHARDS = 4
"""Shards that are filled at a time, so that one straggler keeps nobody waiting."""
WAITING_ROWS = 2048
"""Rows that wait for their host, for a slot or between two attempts, besides those under way."""
FULL_BATCH_WAIT = 0.05
"""Seconds a picture waits for others to fill its batch."""
WRITE_ROWS = 128
"""Rows of a shard that are made durable together."""
WRITE_SECONDS = 5.0
"""Longest time an outcome waits for that."""
WATCH_SECONDS = 0.5
"""Between two looks at the stages."""


@dataclasses.dataclass(frozen=True)
class Body:
    """A row whose image file has come, or why it has not."""

    filling: Filling
    row: int
    fetched: Fetched


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded row on its way to the encoder."""

    filling: Filling
    pixels: np.ndarray
    record: RowRecord


class Pipeline:
    """Runs shards through the stages; `finished` is called with each that is done and the seconds it took.

    `bar` counts rows. Once `run` is over, `gauges` say what bounded it.
    """

    keeps = True
    """What is encoded when it is interrupted is worth writing."""

    def __init__(
        self, tower: VisionTower, config: Stages, bar: Any, finished: Callable[[Shard, float], None]
    ) -> None:
        self.tower, self.config, self.bar, self.finished = tower, config, bar, finished
        self.limits = FetchLimits(
            timeout=config.timeout,
            max_bytes=config.max_bytes,
            retries=config.retries,
            concurrency=config.concurrency,
            per_host=config.per_host,
            host_rate=config.host_rate,
            bytes_in_flight=config.bytes_in_flight,
            allow_private=config.allow_private,
            ignore_robots=config.ignore_robots,
            patience=config.patience,
        )
        self.duplicates = Duplicates()
        self.threads = config.decoders or cpu_cores()
        self.gauges = Gauges(decode=self.threads, encode=1, write=1)
        self.failed = 0
        self.open: list[Filling] = []
        self.broken: LlavaError | OSError | None = None
        """Why a shard could not be opened."""

    def run(self, shards: Sequence[Callable[[], Filling]]) -> None:
        """Open the shards one after the other and fill them.

        Ctrl-C, SIGTERM and SIGHUP end it with KeyboardInterrupt after everything encoded so far is on disk.
        """
        self.drive(
            lambda: (
                self._feed(shards),
                self._download_all(),
                self._decode_all(),
                self._encode_all(),
                self._write_all(),
            )
        )

    def drive(self, stages: Callable[[], Iterable[Coroutine[Any, Any, None]]]) -> None:
        """Run these together, once there are queues between them and threads for their work."""
        try:
            with _signals_restored():
                asyncio.run(self._run(stages))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for filling in self.open:
                filling.close()

    async def _run(self, stages: Callable[[], Iterable[Coroutine[Any, Any, None]]]) -> None:
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None
        if threading.current_thread() is threading.main_thread():
            for signum in stop_signals():
                loop.add_signal_handler(signum, this.cancel)
        # Rows that wait between two attempts, or for their outcome to be believed, do not keep the host idle.
        self.rows: HostQueues[Place] = HostQueues(2 * self.config.per_host)
        self.bodies: asyncio.Queue[Body | None] = asyncio.Queue(4 * self.config.concurrency)
        self.loads = asyncio.Semaphore(self.threads)
        self.pictures: asyncio.Queue[Picture | None] = asyncio.Queue(2 * self.config.batch_size)
        self.outcomes: asyncio.Queue[tuple[Filling, RowRecord] | None] = asyncio.Queue(4 * WRITE_ROWS)
        self.taken = asyncio.Event()
        """Set when a row has been taken or a shard has been finished."""
        try:
            with (
                ThreadPoolExecutor(self.threads, "decode") as self.decoders,
                ThreadPoolExecutor(1, "encode") as self.encoder,
                ThreadPoolExecutor(1, "disk") as self.disk,
            ):
                async with Fetcher(self.limits) as self.fetcher, in_background(self._watch()):
                    await together(stages())
        except BaseException as error:
            if self.keeps:
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
                self._take(*item)
        for filling in list(self.open):
            if filling.waiting:
                self._write(filling)

    # ---- rows

    async def _feed(self, shards: Sequence[Callable[[], Filling]]) -> None:
        loop = asyncio.get_running_loop()
        for open_shard in shards:
            while len(self.open) >= OPEN_SHARDS or self.rows.startable >= self.config.concurrency:
                self.taken.clear()
                await self.taken.wait()
            try:
                filling = await loop.run_in_executor(self.disk, open_shard)
            except FinishedMeanwhile:
                continue
            except (LlavaError, OSError) as error:  # the shards that are open are to be finished first
                self.broken = error
                break
            self.open.append(filling)
            self.bar.update(len(filling.urls) - filling.missing)
            await self._enqueue(filling)
            if not filling.pending:
                await loop.run_in_executor(self.disk, self._write, filling)
        self.rows.close()

    async def _enqueue(self, filling: Filling) -> None:
        for row in np.flatnonzero(filling.writer.status == Status.OK).tolist():
            record = filling.writer.outcome(row)
            if filling.host(row) is not None:
                self.duplicates.claim(filling.urls[row], (filling, row))
            self.duplicates.claim(record.sha256, (filling, row))
            self.duplicates.settle((filling, row), record)
        for row in filling.pending:
            host, place = filling.host(row), (filling, row)
            if filling.captions[row] is None:
                await self.outcomes.put((filling, RowRecord(row, Status.BAD_CAPTION)))
            elif host is not None and (twin := self._twin(filling.urls[row], place)):
                await self._follow(twin, filling, RowRecord(row, Status.PENDING))
            else:
                self.rows.put(host, place)

    def _twin(self, key: str | bytes, place: Place) -> First | Known | None:
        """The row that shows the same and has all that this one's shard keeps."""
        twin = self.duplicates.claim(key, place)
        if twin is not None and place[0].writer.layout.thumbnails:
            layout = twin.shard.layout if isinstance(twin, Known) else twin.place[0].writer.layout
            if not layout.thumbnails:
                return None
        return twin

    async def _follow(self, twin: First | Known, filling: Filling, record: RowRecord) -> None:
        """Give a row the outcome of the one that shows the same, now or when it comes."""
        if isinstance(twin, First) and twin.record is None:
            twin.followers.append((filling, record))
            return
        found = await asyncio.get_running_loop().run_in_executor(self.disk, _recall, twin)
        await self.outcomes.put((filling, _copied(found, record)))

    # ---- pictures

    async def _download_all(self) -> None:
        await together(self._download() for _ in range(self.config.concurrency + WAITING_ROWS))
        await self.bodies.put(None)

    async def _download(self) -> None:
        while (taken := await self.rows.get()) is not None:
            self.taken.set()
            host, (filling, row) = taken
            if host is not None:
                self.gauges.first = "download"
            try:
                fetched = await self._load(filling, row) or await self.fetcher.fetch(filling.urls[row])
            finally:
                self.rows.done(host)
            await self.bodies.put(Body(filling, row, fetched))

    async def _decode_all(self) -> None:
        await together(self._decode_one_by_one() for _ in range(2 * self.threads))
        await self.pictures.put(None)

    async def _decode_one_by_one(self) -> None:
        loop = asyncio.get_running_loop()
        while (body := await self.bodies.get()) is not None:
            filling, row, fetched = body.filling, body.row, body.fetched
            try:
                decoded = await loop.run_in_executor(self.decoders, self._decode, filling, row, fetched)
            finally:
                self.fetcher.release(fetched)
            if isinstance(decoded, Picture):
                await self.pictures.put(decoded)
            elif isinstance(decoded, RowRecord):
                await self.outcomes.put((filling, decoded))
            else:
                twin, record = decoded
                await self._follow(twin, filling, record)
        await self.bodies.put(None)  # for the next of us

    async def _load(self, filling: Filling, row: int) -> Fetched | None:
        """An image that needs no network; None for one at an address."""
        if filling.images is None:
            return None
        loop, memory, limit = asyncio.get_running_loop(), self.fetcher.memory, self.config.max_bytes
        async with self.loads:
            await memory.room()
            loaded = await loop.run_in_executor(self.decoders, filling.images.load, row, limit)
            if loaded:
                memory.hold(len(loaded.body))
        return loaded

    def _decode(
        self, filling: Filling, row: int, fetched: Fetched
    ) -> Picture | RowRecord | tuple[First | Known, RowRecord]:
        """The row's picture; its outcome if it has none; or the row that shows the same image."""
        record = RowRecord(row, fetched.status, None, fetched.http, fetched.attempts, len(fetched.body))
        record.mtime = fetched.mtime
        if fetched.status is not Status.OK:
            return record
        with self.gauges["decode"].work():
            record.sha256 = hashlib.sha256(fetched.body).digest()
            if twin := self._twin(record.sha256, (filling, row)):
                return twin, record
            try:
                decoded = self.tower.preprocess.decode_image(fetched.body, self.config.max_pixels)
            except ImageError as error:
                record.status = error.status
                return record
            record.orig_hw = decoded.orig_hw
            if filling.writer.layout.thumbnails:
                record.thumbnail = self.tower.preprocess.thumbnail(decoded, THUMBNAIL_BYTES)
        return Picture(filling, decoded.pixels, record)

    # ---- features

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
                for encoded in batch:
                    await self.outcomes.put((encoded.filling, encoded.record))
        await self.outcomes.put(None)

    def _encode(self, batch: Sequence[Picture]) -> None:
        """Fill in each picture's features, or that they are not finite."""
        with self.gauges["encode"].work():
            pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
            features = self.tower.encode(pixels).half()
            finite = features.isfinite().flatten(1).all(1).tolist()
            for picture, row, fine in zip(batch, features.cpu().numpy(), finite, strict=True):
                if fine:
                    picture.record.features = row
                else:
                    picture.record.status = Status.NOT_FINITE

    # ---- outcomes

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
                more = item is not None
                if item is not None:
                    self._take(*item)
                    oldest = oldest or loop.time()
                ready = [f for f in self.open if f.waiting and len(f.waiting) >= min(WRITE_ROWS, f.missing)]
            for filling in ready:
                await loop.run_in_executor(self.disk, self._write, filling)
                self.taken.set()

    def _take(self, filling: Filling, record: RowRecord) -> None:
        """An outcome has come, and with it those of the rows that waited for it."""
        filling.waiting.append(record)
        self.failed += record.status is not Status.OK
        self.bar.update()
        for follower, partly in self.duplicates.settle((filling, record.row), record):
            self._take(follower, _copied(record, partly))

    def _write(self, filling: Filling) -> None:
        with self.gauges["write"].work():
            filling.write()
        if filling.missing == 0:
            self.open.remove(filling)
            shard = Shard(filling.writer.path)
            self.duplicates.finished(shard, filling)
            self.finished(shard, time.monotonic() - filling.started)

    async def _watch(self) -> None:
        """Keep the gauges, and the live line up to date."""
        fetcher, rate = self.fetcher, 0.0
        while True:
            before = fetcher.received
            await asyncio.sleep(WATCH_SECONDS)
            rate += 0.3 * ((fetcher.received - before) / WATCH_SECONDS - rate)
            self.gauges.sample(
                decode=self.bodies.qsize(), encode=self.pictures.qsize(), write=self.outcomes.qsize()
            )
            parts = [f"{rate / 1e6:.1f} MB/s", f"{fetcher.in_flight} in flight", f"{self.gauges.now}-bound"]
            if self.failed:
                parts.append(f"{self.failed} failed")
            self.bar.set_postfix_str(", ".join(parts), refresh=False)


def _recall(twin: First | Known) -> RowRecord:
    if isinstance(twin, Known):
        return twin.recall()
    filling, _ = twin.place
    assert twin.record is not None
    return filling.recall(twin.record)


def _copied(found: RowRecord, partly: RowRecord) -> RowRecord:
    """The outcome `found` for another row; what is known of that row's own download stays."""
    return dataclasses.replace(
        found,
        row=partly.row,
        http=partly.http or found.http,
        attempts=partly.attempts,
        mtime=partly.mtime,
    )
