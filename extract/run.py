"""`extract run` and `extract retry-failed`: which shards are to be filled, and how it went."""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from extract.config import Encoding, RetryConfig, RunConfig
from extract.filling import Filling
from extract.pipeline import Pipeline
from extract.share import share_of
from extract.sources.base import Rows, Source
from extract.sources.find import find_sources, sources_of
from extract.summary import outcome_table, summarise, write_statistics
from llava_core.console import counted, human_bytes, progress, say, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict, first_difference
from llava_core.layout import Layout, disk_bytes
from llava_core.shard_writer import ShardWriter, is_finished, part_of, require_storage
from llava_core.shards import Shard, ShardHeader, open_shards
from llava_core.status import Failure, Status
from llava_core.vision import VisionTower, open_vision_tower

T = TypeVar("T")
Flags = TypeVar("Flags", bound=Encoding)

TOO_MANY_FAILED = 3
"""Exit code when more than --max-failed of the rows have failed."""


def run(config: RunConfig) -> JsonDict:
    """Fill a shard for every source that has none; returns the figures of the summary."""
    sources, config = _part(find_sources(config.data, config.images, config.limit), "sources", config)
    if not sources:
        return _nothing(config)
    paths = {source: config.out / f"{source.stem}.h5" for source in sources}
    _require_other_names(paths)
    if config.ray is not None and not config.dry_run:
        from extract.cluster import fill_on_ray  # its workers use this module

        started = time.monotonic()
        figures = fill_on_ray(config, sources)
        return conclude(config, figures, {"seconds": round(time.monotonic() - started, 2)})
    tower = open_tower(config)
    say(describe(tower))
    if config.dry_run:
        return _plan(config, sources, tower)
    todo = [source for source in sources if not is_done(paths[source], source, tower, config)]
    say(
        f"{sum(source.rows for source in sources):,} rows in {counted(len(sources), 'source')}; "
        + (f"{len(sources) - len(todo)} shards are finished, {len(todo)} to go" if todo else "nothing to do")
    )
    opened = [functools.partial(open_filling, paths[source], source, tower, config) for source in todo]
    finished = [Shard(paths[source]) for source in sources if source not in todo]
    speed = fill(config, tower, opened, finished, rows=sum(source.rows for source in todo))
    return conclude(config, summarise([Shard(path) for path in paths.values()]), speed)


def retry_failed(config: RetryConfig) -> JsonDict:
    """Fill the failed rows of finished shards again; returns the figures of the summary."""
    chosen = [Failure.parse(name) for name in config.status] or [
        Failure(status) for status in Status if status.failed and status is not Status.BAD_CAPTION
    ]
    shards, config = _part(open_shards(config.out), "shards", config)
    if not shards:
        return _nothing(config)
    tower = open_tower(config)
    say(describe(tower))
    _require_same(shards[0].path, shards[0], tower)
    counts = {shard.path: int(shard.failed(chosen).sum()) for shard in shards}
    todo = [shard for shard in shards if counts[shard.path] or not is_finished(shard.path)]
    say(f"{sum(counts.values()):,} failed rows in {len(todo)} of {len(shards)} shards to try again")
    sources = sources_of(todo, config.data, config.images)
    opened = [
        functools.partial(_reopen, shard, chosen, source) for shard, source in zip(todo, sources, strict=True)
    ]
    speed = fill(config, tower, opened, shards, rows=sum(shard.rows for shard in todo))
    return conclude(config, summarise([Shard(shard.path) for shard in shards]), speed)


def _require_other_names(paths: dict[Source, Path]) -> None:
    """Raise LlavaError if the statistics of a shard would overwrite what it is made from."""
    for source, path in paths.items():
        if source.path.resolve() == path.with_suffix(".json").resolve():
            raise LlavaError(
                f"the statistics beside {path} would overwrite {source.path}", do="choose another --out"
            )


def _part(things: Sequence[T], noun: str, config: Flags) -> tuple[list[T], Flags]:
    """What of the files is this worker's, and the flags with its part of the limits."""
    share = share_of(os.environ)
    part = share.take(things)
    if share.of > 1:
        say(f"worker {share.index + 1} of {share.of}: {len(part)} of {len(things)} {noun}")
    return part, share.limits(config)


def _nothing(config: Encoding) -> JsonDict:
    say("no file is left for this worker; done")
    return {**summarise([]), "seconds": 0.0, "out": str(config.out)}


def open_tower(config: Encoding) -> VisionTower:
    return open_vision_tower(
        config.vision, pick_device(config.device), layer=config.layer, decode=config.decode
    )


def describe(tower: VisionTower) -> str:
    return (
        f"frozen: {tower.encoder['model_id']} on {tower.device} in {tower.encoder['dtype']}, "
        f"[{tower.tokens}, {tower.width}] an image; fingerprint {tower.fingerprint[:12]}"
    )


def is_done(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> bool:
    """Whether the shard is finished. Raises LlavaError if it is one of another encoder or other rows."""
    if not is_finished(path):
        return False
    shard = Shard(path)
    _require_same(path, shard, tower)
    if shard.source != source.identity():
        raise LlavaError(
            f"{path} was made from another file, or from other rows of it",
            expected=source.identity(),
            got=shard.source,
            do="choose another --out, mend --limit, or delete that shard",
        )
    require_storage(path, shard.layout, config.dtype)
    _mention_thumbnails(path, shard.layout, config)
    return True


def _mention_thumbnails(path: Path, layout: Layout, config: RunConfig) -> None:
    if config.thumbnails and not layout.thumbnails:
        say(f"{path} was begun without --thumbnails and stays so; delete it to make it anew with them")


def _require_same(path: Path, shard: Shard, tower: VisionTower) -> None:
    if shard.fingerprint != tower.fingerprint:
        ours = {**tower.encoder, **tower.preprocess.to_json()}
        raise LlavaError(
            f"{path} holds features of another encoder",
            got=first_difference({**shard.encoder, **shard.preprocess}, ours),
            do="use that encoder, or choose another --out",
        )


def open_filling(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> Filling:
    return filling_of(path, source.read(), source.identity(), tower, config)


def filling_of(path: Path, rows: Rows, source: JsonDict, tower: VisionTower, config: RunConfig) -> Filling:
    """Begin, or continue, the shard of these rows; `source` is what it remembers of where they are from."""
    header = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source=source,
        tokens=tower.tokens,
        width=tower.width,
        captions=[text or "" for text in rows.texts],
        urls=rows.places,
        ids=rows.ids,
        storage=config.dtype,
        thumbnails=config.thumbnails,
        conversations=rows.conversations,
        local=rows.images is not None,
    )
    writer = ShardWriter(path, header)
    _mention_thumbnails(writer.part, writer.layout, config)
    return Filling(writer, rows.places, rows.texts, rows.images)


def _reopen(shard: Shard, chosen: Sequence[Failure], source: Source | None) -> Filling:
    images = source.read().images if source else None
    writer = ShardWriter(shard.path, retry=chosen)
    urls = shard.urls()
    captions = [shard.caption(row) or None for row in range(shard.rows)]
    return Filling(writer, urls, captions, images)


def fill(
    config: Encoding,
    tower: VisionTower,
    shards: Sequence[Callable[[], Filling]],
    finished: Sequence[Shard],
    rows: int,
    counter: Callable[[int, str], Any] = progress,
) -> JsonDict:
    """Returns the figures of its speed: seconds, and, if there was something to do, what bounded it.

    `finished` may hold what the rows show already; `counter` makes the bar that counts them.
    """
    started = time.monotonic()
    if not shards:
        return {"seconds": 0.0}

    def announce(shard: Shard, seconds: float) -> None:
        write_statistics(shard, seconds)
        say(f"{shard.path}: {shard.rows:,} rows, {int((shard.status != Status.OK).sum()):,} failed")

    with counter(rows, "rows") as bar:
        pipeline = Pipeline(tower, config, bar, announce)
        for shard in finished:
            pipeline.duplicates.finished(shard)
        pipeline.run(shards)
    return {"seconds": round(time.monotonic() - started, 2), **pipeline.gauges.figures()}


def conclude(config: Encoding, figures: JsonDict, speed: JsonDict) -> JsonDict:
    """Print the summary; returns its figures."""
    share = figures["failed"] / figures["rows"]
    print(outcome_table(figures))
    if figures["failed_hosts"]:
        hosts = ", ".join(f"{host} ({n:,})" for host, n in figures["failed_hosts"].items())
        say(f"most failures: {hosts}")
    if share > config.max_failed:
        say(
            f"{share:.1%} of the rows failed, over --max-failed {config.max_failed:g}; `extract retry-failed`"
        )
        figures["exit_code"] = TOO_MANY_FAILED
    if "bottleneck" in speed:
        busy = ", ".join(f"{name} busy {stage['busy']:.0%}" for name, stage in speed["stages"].items())
        say(f"{speed['seconds']:,.0f} s, bounded by {speed['bottleneck']} ({busy} of the time)")
    return {**figures, **speed, "out": str(config.out)}


def _plan(config: RunConfig, sources: Sequence[Source], tower: VisionTower) -> JsonDict:
    rows = sum(source.rows for source in sources)
    folder = next(path for path in (config.out, *config.out.resolve().parents) if path.exists())
    figures = {
        "sources": len(sources),
        "rows": rows,
        "finished_shards": sum(is_finished(config.out / f"{source.stem}.h5") for source in sources),
        "unfinished_shards": sum(part_of(config.out / f"{source.stem}.h5").exists() for source in sources),
        "disk_bytes": rows * disk_bytes(config.dtype, tower.tokens, tower.width, config.thumbnails),
        "free_bytes": shutil.disk_usage(folder).free,
    }
    shown = [human_bytes(value) if "bytes" in key else f"{value:,}" for key, value in figures.items()]
    print(table(list(zip((key.replace("_", " ") for key in figures), shown, strict=True))))
    return figures
