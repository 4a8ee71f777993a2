"""Measures the stages of `extract run`: each alone, between a list and a list, then all together."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from extract.config import RunConfig
from extract.deduplicate import Deduplicator
from extract.extract_shards import open_shard_of
from extract.open_shard import OpenShard
from extract.pipeline import run_pipeline
from extract.row_job import ImageJob, RowJob, RowRef
from extract.sources.base import Columns, Source
from extract.stages.decode import Decode, EncoderInput
from extract.stages.download import Download
from extract.stages.encode import Encode
from extract.stages.metrics import ProgressBar
from extract.stages.write import Write
from extract.statistics import summarise
from llava_core.cli.console import progress
from llava_core.errors import LlavaError
from llava_core.filesystem import nearest_existing
from llava_core.network.async_tasks import run_async, together
from llava_core.network.fetch import Fetcher
from llava_core.network.rate_limit import ByteBudget
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

STEADY = 0.9
"""Share of the rows from which on a rate counts: the last ones may wait long for a slow host, which holds
nobody up in a long run."""
Job = TypeVar("Job", ImageJob, RowJob)
Part = tuple[str, Columns]
"""Name of a shard, and the rows of one source that it is made of."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stage, or all of them."""

    rows: int
    seconds: float
    """Seconds to the last row."""
    samples_per_s: float
    """Rate, stragglers aside (`RateMeter`)."""
    mb_per_s: float
    """Megabytes a second of image files; of encode and write, of features as they are stored."""
    busy: float | None = None
    """Share of the time that it worked while all stages ran together; None of downloads and of the whole."""


class RateMeter:
    """A progress bar that records when each row came."""

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.began = time.monotonic()
        self.times: list[float] = []
        """Seconds from the beginning to each row."""

    def update(self, n: int = 1) -> None:
        self.times += [time.monotonic() - self.began] * n
        self.bar.update(n)

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        self.bar.set_postfix_str(s, refresh)

    @property
    def rate(self) -> float:
        """Rows a second: the best rate over the first 90 % of the rows or more; 0 without any."""
        least = max(1, int(STEADY * len(self.times)))
        return max((n / max(self.times[n - 1], 1e-9) for n in range(least, len(self.times) + 1)), default=0.0)


class Collector(Generic[Job]):
    """A list in place of the next stage's inbox, whose arrivals are counted."""

    def __init__(self, meter: RateMeter, memory: ByteBudget | None = None) -> None:
        """`memory`: budget from which image files are released as they come."""
        self.meter, self.memory = meter, memory
        self.jobs: list[Job] = []

    async def put(self, item: Job | None) -> None:
        if item is None:
            return
        if self.memory is not None and isinstance(item, ImageJob):
            self.memory.release(len(item.body))
        self.jobs.append(item)
        self.meter.update()


def part_of(sources: Sequence[Source], start: int, count: int) -> list[Part]:
    """`count` rows from `start` on, counted over all sources."""
    parts, before = [], 0
    for source in sources:
        first, last = max(0, start - before), min(source.rows, start + count - before)
        if first < last:
            parts.append((source.stem, source.first(last).read().after(first)))
        before += source.rows
    return parts


def run_stage(stage: Decode | Encode | Write, jobs: Sequence[Any]) -> None:
    """Run one stage on these jobs to its end."""

    async def feed() -> None:
        for job in jobs:
            await stage.inbox.put(job)
        await stage.inbox.put(None)

    run_async(together((feed(), stage.run())))


def run_download(
    refs: Sequence[RowRef], config: RunConfig, cpu: ThreadPoolExecutor, meter: RateMeter
) -> list[ImageJob]:
    """Download, or read, the image files of these rows."""
    fetcher = Fetcher(config.fetch_limits())
    out = Collector[ImageJob](meter, fetcher.memory)
    stage = Download(out, fetcher, cpu, config)
    for ref in refs:
        stage.inbox.put(ref.shard.host(ref.row), (ref,))
    stage.inbox.close()

    async def run() -> None:
        async with fetcher:
            await stage.run()

    run_async(run())
    return out.jobs


def measure_alone(config: RunConfig, tower: VisionTower, parts: Sequence[Part]) -> dict[str, Measured]:
    """Each stage on what the one before it gave. Raises LlavaError if no row came to the encoder."""
    with contextlib.ExitStack() as stack:
        shards = [opener() for opener in stack.enter_context(openers(config, tower, parts))]
        for shard in shards:
            stack.callback(shard.close)
        cpu = stack.enter_context(ThreadPoolExecutor(config.decode_threads, "decode"))
        gpu = stack.enter_context(ThreadPoolExecutor(1, "encode"))
        disk = stack.enter_context(ThreadPoolExecutor(1, "disk"))

        def meter(stage: str, rows: int) -> RateMeter:
            return RateMeter(stack.enter_context(progress(rows, "rows", desc=stage, leave=False)))

        refs = [RowRef(shard, row) for shard in shards for row in shard.pending]
        captioned = [ref for ref in refs if ref.shard.captions[ref.row] is not None]
        first = "download" if any(ref.shard.host(ref.row) for ref in captioned) else "read"
        stages = {}

        came = meter(first, len(captioned))
        downloaded = run_download(captioned, config, cpu, came)
        received = sum(len(job.body) for job in downloaded)
        stages[first] = _measured(came, received)

        came = meter("decode", len(downloaded))
        decoded, failed = Collector[ImageJob](came), Collector[RowJob](came)
        takes = EncoderInput(tower.preprocess, {tower.identity.fingerprint}, decoded)
        run_stage(Decode([takes], failed, cpu, config, ByteBudget(), deduplicator=None), downloaded)
        stages["decode"] = _measured(came, received)
        if not decoded.jobs:
            counts = collections.Counter(job.record.status.label for job in failed.jobs)
            got = ", ".join(f"{n:,} {label}" for label, n in counts.items()) or "no row with a caption"
            raise LlavaError("none of the first rows has an image to encode", got=got)

        pixels = decoded.jobs[0].pixels
        assert pixels is not None
        tower.encode(pixels[None])  # the first time, libraries are loaded and kernels chosen
        row_bytes = shards[0].writer.layout.row_bytes
        came = meter("encode", len(decoded.jobs))
        encoded = Collector[RowJob](came)
        run_stage(Encode(encoded, [tower], gpu, config.batch_size), decoded.jobs)
        stages["encode"] = _measured(came, len(encoded.jobs) * row_bytes)

        outcomes = failed.jobs + encoded.jobs
        outcomes += [
            RowJob(ref.shard, RowRecord(ref.row, Status.BAD_CAPTION))
            for ref in refs
            if ref.shard.captions[ref.row] is None
        ]
        came = meter("write", len(outcomes))
        run_stage(Write(disk, came, lambda shard, seconds: None, Deduplicator(), shards), outcomes)
        # The meter counts what the stage has taken, which is not on disk yet.
        seconds = time.monotonic() - came.began
        written = len(encoded.jobs) * row_bytes / seconds / 1e6
        stages["write"] = Measured(len(outcomes), seconds, len(outcomes) / seconds, written)
    return stages


def measure_together(
    config: RunConfig, tower: VisionTower, parts: Sequence[Part]
) -> tuple[Measured, dict[str, float], JsonDict]:
    """The whole pipeline: its rate, how busy each stage was, and the outcomes of the rows."""
    rows, shards = sum(len(columns.image_refs) for _, columns in parts), list[Shard]()

    def done(shard: Shard, seconds: float) -> None:
        shards.append(shard)

    with openers(config, tower, parts) as opened, progress(rows, "rows", desc="together", leave=False) as bar:
        meter = RateMeter(bar)
        figures = run_async(
            run_pipeline([tower], config, [[opener] for opener in opened], meter, done, keep=False)
        )
        outcomes = summarise(shards)
    busy = {name: stage["busy"] for name, stage in figures["stages"].items()}
    return _measured(meter, outcomes["image_bytes"]), busy, outcomes


@contextlib.contextmanager
def openers(
    config: RunConfig, tower: VisionTower, parts: Sequence[Part]
) -> Iterator[list[Callable[[], OpenShard]]]:
    """Openers of these shards, in a temporary folder on the disk of --out."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=nearest_existing(config.out)) as folder:
        yield [
            functools.partial(
                open_shard_of,
                path=Path(folder, f"{stem}.h5"),
                columns=columns,
                source={"name": stem, "rows": len(columns.image_refs)},
                tower=tower,
                config=config,
            )
            for stem, columns in parts
        ]


def _measured(meter: RateMeter, received: int) -> Measured:
    """A stage's figures; `received`: bytes of its rows."""
    rows = len(meter.times)
    seconds = meter.times[-1] if rows else 0.0
    return Measured(rows, seconds, meter.rate, meter.rate * received / max(rows, 1) / 1e6)
