"""`extract bench`: how fast each stage is, which one bounds `extract run`, and how long that will take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from extract.bench.measure import Measured, Part, measure_alone, measure_together, part_of
from extract.bench.read_throughput import read_rates
from extract.config import BenchConfig, RunConfig
from extract.extract_shards import describe, open_tower
from extract.sources.base import DataFlags, host_of
from extract.sources.find import find_sources
from extract.statistics import TOO_MANY_FAILED, outcome_table
from llava_core.cli.console import counted, human_bytes, human_seconds, say, show, table
from llava_core.cli.translation import translated
from llava_core.device import free_ram
from llava_core.errors import LlavaError
from llava_core.launcher_variables import cpu_cores
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

FILE_BYTES = 500_000
"""Assumed size of an image file, about that of SA-1B's, to estimate memory."""

FEW = 64
"""Measured rows below which a stage's start outweighs its rate."""


def run(config: BenchConfig) -> JsonDict:
    """Print the table; returns its figures."""
    if config.features is not None:
        return read_rates(config.features, config.count)
    flags = config.as_run()
    sources = find_sources(flags.data, DataFlags.of(flags), flags.limit)
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
    """Raise LlavaError if the files, pixels and features of `count` rows would fill the memory."""
    side = tower.preprocess.size
    needed = count * (FILE_BYTES + side * side * 3 + tower.tokens * tower.width * 2)
    if needed > (free := free_ram()) / 2:
        raise LlavaError(
            "--count is too high for this machine's memory",
            expected=f"at most half of the {human_bytes(free)} that are free",
            got=f"about {human_bytes(needed)}",
            do="give fewer",
        )


def faster(stage: str, config: RunConfig, tower: VisionTower, parts: Sequence[Part]) -> str:
    """Advice that would make the slowest stage faster."""
    if stage == "download":
        if config.host_rate:
            return f"a higher --host-rate ({config.host_rate:g} now)"
        hosts = {host for _, columns in parts for host in map(host_of, columns.image_refs)}
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
        few = counted(figures["measured_rows"], "row")
        show(translated(f"\n{few}: fewer than {FEW} do not tell what bounds a run"))
        return
    bound = (
        f"\nbounded by {figures['bottleneck']}: {figures['rows']:,} rows take about "
        f"{human_seconds(figures['hours'] * 3600)} at {figures['samples_per_s']:,.1f} samples/s; "
        f"faster with {figures['faster']}"
    )
    show(translated(bound))
