"""`extract bench`: how fast each stage is, which one bounds `extract run`, and how long that will take."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from extract.alone import Alone, Pace
from extract.config import BenchConfig, RunConfig
from extract.extract_shards import describe, filling_of, open_tower
from extract.open_shard import Filling
from extract.outcomes import TOO_MANY_FAILED, host_of, outcome_table, summarise
from extract.pipeline import Pipeline
from extract.read_throughput import read_rates
from extract.sources.base import Rows, Source
from extract.sources.find import find_sources
from llava_core.cli.console import counted, human_bytes, human_seconds, progress, say, show, table
from llava_core.device import free_ram
from llava_core.errors import LlavaError
from llava_core.filesystem import nearest_existing
from llava_core.launcher import cpu_cores
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

FILE_BYTES = 500_000
"""Assumed of an image file, where memory is asked for: SA-1B's take about as much."""

FEW = 64
"""Measured rows below which a stage's start counts for more than its pace."""

Part = tuple[str, Rows]
"""Rows of one source, and the name of the shard they become."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stage, or all of them."""

    rows: int
    seconds: float
    """To the last row."""
    samples_per_s: float
    """Stragglers aside (extract.alone.Pace)."""
    mb_per_s: float
    """Of image files, or, of encode and write, of features as they are stored."""
    busy: float | None = None
    """Share of the time that it worked while all stages ran together; None of downloads and of the whole."""


def run(config: BenchConfig) -> JsonDict:
    """Print the table; returns its figures."""
    if config.features is not None:
        return read_rates(config.features, config.count)
    flags = config.as_run()
    sources = find_sources(flags.data, flags.images, flags.limit)
    rows = sum(source.rows for source in sources)
    tower = open_tower(flags)
    say(describe(tower))
    require_memory(config.count, tower)
    again = rows < 2 * config.count
    alone = part_of(sources, 0, config.count)
    whole = alone if again else part_of(sources, config.count, config.count)
    taken = min(rows, config.count)
    say(
        f"{counted(rows, 'row')} in {counted(len(sources), 'source')}; "
        + (f"{taken:,} of them twice, the second time from caches" if again else f"2 × {taken:,} of them")
    )
    stages = measure_alone(flags, tower, alone)
    together, busy, outcomes = measure_together(flags, tower, whole)
    stages = {name: dataclasses.replace(stage, busy=busy.get(name)) for name, stage in stages.items()}
    bottleneck = min(stages, key=lambda name: stages[name].samples_per_s)
    rate = min(together.samples_per_s, stages[bottleneck].samples_per_s)
    figures = {
        "rows": rows,
        "measured_rows": taken,
        "stages": {name: dataclasses.asdict(stage) for name, stage in stages.items()},
        "together": dataclasses.asdict(together),
        "bottleneck": bottleneck,
        "samples_per_s": rate,
        "hours": rows / rate / 3600,
        "faster": faster(bottleneck, flags, tower, alone),
        **{key: outcomes[key] for key in ("ok", "failed", "by_status", "by_http", "failed_hosts")},
    }
    _print(figures, stages, together)
    if outcomes["failed"]:
        show(outcome_table(outcomes))
    if (share := outcomes["failed"] / outcomes["rows"]) > flags.max_failed:
        say(f"{share:.1%} of the rows failed, over --max-failed {flags.max_failed:g}")
        figures["exit_code"] = TOO_MANY_FAILED
    return figures


def require_memory(count: int, tower: VisionTower) -> None:
    """Raise LlavaError if the files, pictures and features of so many rows would fill the memory."""
    side = tower.preprocess.size
    needed = count * (FILE_BYTES + side * side * 3 + tower.tokens * tower.width * 2)
    if needed > (free := free_ram()) / 2:
        raise LlavaError(
            "--count is too high for this machine's memory",
            expected=f"at most half of the {human_bytes(free)} that are free",
            got=f"about {human_bytes(needed)}",
            do="give fewer",
        )


def part_of(sources: Sequence[Source], start: int, count: int) -> list[Part]:
    """The rows from `start` on, counted over all sources."""
    parts, before = [], 0
    for source in sources:
        first, last = max(0, start - before), min(source.rows, start + count - before)
        if first < last:
            parts.append((source.stem, source.first(last).read().after(first)))
        before += source.rows
    return parts


def measure_alone(config: RunConfig, tower: VisionTower, parts: Sequence[Part]) -> dict[str, Measured]:
    """Each stage with what the one before it gave. Raises LlavaError if no row came to the encoder."""

    def pace(stage: str, rows: int) -> tuple[Alone, Pace]:
        bar = Pace(stack.enter_context(progress(rows, "rows", desc=stage, leave=False)))
        return Alone(tower, config, bar), bar

    with contextlib.ExitStack() as stack:
        fillings = [opener() for opener in stack.enter_context(openers(config, tower, parts))]
        for filling in fillings:
            stack.callback(filling.close)
        places = [(f, row) for f in fillings for row in f.pending if f.captions[row] is not None]
        local = not any(filling.host(row) for filling, row in places)
        first = "read" if local else "download"
        stages = {}

        pipeline, bar = pace(first, len(places))
        bodies = pipeline.download(places)
        received = sum(len(body.fetched.body) for body in bodies)
        stages[first] = _measured(bar, received)

        pipeline, bar = pace("decode", len(bodies))
        pictures, outcomes = pipeline.decode(bodies)
        if not pictures:
            failed = collections.Counter(record.status.label for _, record in outcomes)
            got = ", ".join(f"{n:,} {label}" for label, n in failed.items()) or "no row with a caption"
            raise LlavaError("none of the first rows has a picture to encode", got=got)
        stages["decode"] = _measured(bar, received)

        tower.encode(pictures[0].pixels[None])  # the first time, libraries are loaded and kernels chosen
        pipeline, bar = pace("encode", len(pictures))
        encoded = pipeline.encode(pictures)
        row_bytes = fillings[0].writer.layout.row_bytes
        stages["encode"] = _measured(bar, len(encoded) * row_bytes)

        bad = Status.BAD_CAPTION
        outcomes += [
            (f, RowRecord(row, bad)) for f in fillings for row in f.pending if f.captions[row] is None
        ]
        outcomes += encoded
        pipeline, bar = pace("write", len(outcomes))
        pipeline.write(outcomes)
        # Its bar counts what it has taken, which is not on disk yet.
        seconds = time.monotonic() - bar.began
        written = len(encoded) * row_bytes / seconds / 1e6
        stages["write"] = Measured(len(outcomes), seconds, len(outcomes) / seconds, written)
    return stages


def measure_together(
    config: RunConfig, tower: VisionTower, parts: Sequence[Part]
) -> tuple[Measured, dict[str, float], JsonDict]:
    """As `extract run` does it: its pace, how busy each stage was, and the outcomes of the rows."""
    rows, shards = sum(len(part.places) for _, part in parts), list[Shard]()
    with openers(config, tower, parts) as opened, progress(rows, "rows", desc="together", leave=False) as bar:
        pace = Pace(bar)
        pipeline = Pipeline(tower, config, pace, lambda shard, seconds: shards.append(shard))
        pipeline.keeps = False
        pipeline.run(opened)
        outcomes = summarise(shards)
        busy = {name: stage["busy"] for name, stage in pipeline.gauges.figures()["stages"].items()}
    return _measured(pace, outcomes["image_bytes"]), busy, outcomes


@contextlib.contextmanager
def openers(
    config: RunConfig, tower: VisionTower, parts: Sequence[Part]
) -> Iterator[list[Callable[[], Filling]]]:
    """Shards of these rows in a folder on the disk of --out that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=nearest_existing(config.out)) as folder:
        yield [
            functools.partial(
                filling_of,
                path=Path(folder, f"{stem}.h5"),
                rows=rows,
                source={"name": stem, "rows": len(rows.places)},
                tower=tower,
                config=config,
            )
            for stem, rows in parts
        ]


def faster(stage: str, config: RunConfig, tower: VisionTower, parts: Sequence[Part]) -> str:
    """What would make the slowest stage faster."""
    if stage == "download":
        if config.host_rate:
            return f"a higher --host-rate ({config.host_rate:g} now)"
        hosts = {host for _, rows in parts for host in map(host_of, rows.places)}
        if len(hosts) * config.per_host < config.concurrency:
            asked = "ask their owners" if len(hosts) > 1 else "ask its owner"
            return (
                f"a higher --per-host ({config.per_host} now, {counted(len(hosts), 'host')}; {asked} first)"
            )
        return f"a higher --concurrency ({config.concurrency} now), if the line has more to give"
    if stage == "read":
        return "a faster disk for the images"
    if stage == "decode":
        if config.decode == "exact":
            return "--decode draft"
        if (config.decoders or cpu_cores()) < cpu_cores():
            return f"more --decoders ({config.decoders} now, {cpu_cores()} cores)"
        return f"more CPU cores ({cpu_cores()} now): another machine, or several"
    if stage == "encode":
        if tower.device.type == "cpu":
            return "a GPU"
        return f"a larger --batch-size ({config.batch_size} now), or more GPUs"
    return "--dtype int8" if config.dtype == "float16" else "a faster disk for --out"


def _measured(pace: Pace, received: int) -> Measured:
    """`received`: bytes that these rows were."""
    rows = len(pace.came)
    seconds = pace.came[-1] if rows else 0.0
    return Measured(rows, seconds, pace.rate, pace.rate * received / max(rows, 1) / 1e6)


def _print(figures: JsonDict, stages: dict[str, Measured], together: Measured) -> None:
    lines = [
        (
            name,
            f"{s.rows:,}",
            f"{s.samples_per_s:,.1f}",
            f"{s.mb_per_s:,.1f}",
            "-" if s.busy is None else f"{s.busy:.0%}",
        )
        for name, s in {**stages, "together": together}.items()
    ]
    show(table(lines, ("stage", "rows", "samples/s", "MB/s", "busy together")))
    if figures["measured_rows"] < FEW:
        show(f"\n{counted(figures['measured_rows'], 'row')}: fewer than {FEW} do not tell what bounds a run")
        return
    show(
        f"\nbounded by {figures['bottleneck']}: {figures['rows']:,} rows take about "
        f"{human_seconds(figures['hours'] * 3600)} at {figures['samples_per_s']:,.1f} samples/s; "
        f"faster with {figures['faster']}"
    )
