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
from extract.pipeline import Filling, Pipeline
from extract.share import share_of
from extract.source import Source, find_sources
from extract.summary import outcome_table, summarise, write_statistics
from llava_core.console import human_bytes, progress, say, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict, first_difference
from llava_core.shard_writer import ShardWriter, is_finished, part_of
from llava_core.shards import FEATURE_TYPE, Shard, ShardHeader, open_shards
from llava_core.status import Status
from llava_core.vision import VisionTower, open_vision_tower

T = TypeVar("T")
Flags = TypeVar("Flags", bound=Encoding)

TOO_MANY_FAILED = 3
"""Exit code when more than --max-failed of the rows have failed."""


def run(config: RunConfig) -> JsonDict:
    """Fill a shard for every parquet file that has none; returns the figures of the summary."""
    sources, config = _part(find_sources(config.data, config.limit), "files", config)
    if not sources:
        return _nothing(config)
    if config.ray is not None and not config.dry_run:
        from extract.cluster import fill_on_ray  # its workers use this module

        started = time.monotonic()
        figures = fill_on_ray(config, sources)
        return conclude(config, figures, time.monotonic() - started)
    tower = open_tower(config)
    say(describe(tower))
    paths = {source: config.out / f"{source.stem}.h5" for source in sources}
    if config.dry_run:
        return _plan(config, sources, tower)
    todo = [source for source in sources if not is_done(paths[source], source, tower)]
    say(
        f"{sum(source.rows for source in sources):,} rows in {len(sources)} files; "
        + (f"{len(sources) - len(todo)} shards are finished, {len(todo)} to go" if todo else "nothing to do")
    )
    opened = [functools.partial(open_filling, paths[source], source, tower) for source in todo]
    seconds = fill(config, tower, opened, rows=sum(source.rows for source in todo))
    return conclude(config, summarise([Shard(path) for path in paths.values()]), seconds)


def retry_failed(config: RetryConfig) -> JsonDict:
    """Fill the failed rows of finished shards again; returns the figures of the summary."""
    chosen = [Status.parse(name) for name in config.status] or [
        status for status in Status if status not in (Status.PENDING, Status.OK, Status.BAD_CAPTION)
    ]
    if Status.PENDING in chosen or Status.OK in chosen:
        raise LlavaError("--status", expected="failures", got=", ".join(config.status), exit_code=2)
    shards, config = _part(open_shards(config.out), "shards", config)
    if not shards:
        return _nothing(config)
    tower = open_tower(config)
    say(describe(tower))
    _require_same(shards[0].path, shards[0], tower)
    counts = {shard.path: sum(int((shard.status == status).sum()) for status in chosen) for shard in shards}
    todo = [shard for shard in shards if counts[shard.path] or not is_finished(shard.path)]
    say(f"{sum(counts.values()):,} failed rows in {len(todo)} of {len(shards)} shards to try again")
    opened = [functools.partial(_reopen, shard, chosen) for shard in todo]
    seconds = fill(config, tower, opened, rows=sum(shard.rows for shard in todo))
    return conclude(config, summarise([Shard(shard.path) for shard in shards]), seconds)


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


def is_done(path: Path, source: Source, tower: VisionTower) -> bool:
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
    return True


def _require_same(path: Path, shard: Shard, tower: VisionTower) -> None:
    if shard.fingerprint != tower.fingerprint:
        ours = {**tower.encoder, **tower.preprocess.to_json()}
        raise LlavaError(
            f"{path} holds features of another encoder",
            got=first_difference({**shard.encoder, **shard.preprocess}, ours),
            do="use that encoder, or choose another --out",
        )


def open_filling(path: Path, source: Source, tower: VisionTower) -> Filling:
    rows = source.read()
    header = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source=source.identity(),
        tokens=tower.tokens,
        width=tower.width,
        captions=[caption or "" for caption in rows.captions],
        urls=rows.urls,
        ids=rows.ids,
    )
    return Filling(ShardWriter(path, header), rows.urls, rows.captions)


def _reopen(shard: Shard, chosen: Sequence[Status]) -> Filling:
    writer = ShardWriter(shard.path, retry=chosen)
    urls = [shard.url(row) for row in range(shard.rows)]
    captions = [shard.caption(row) or None for row in range(shard.rows)]
    return Filling(writer, urls, captions)


def fill(
    config: Encoding,
    tower: VisionTower,
    shards: Sequence[Callable[[], Filling]],
    rows: int,
    counter: Callable[[int, str], Any] = progress,
) -> float:
    """Returns the seconds it took; `counter` makes the bar that counts the rows."""
    started = time.monotonic()

    def finished(filling: Filling) -> None:
        shard = Shard(filling.writer.path)
        write_statistics(shard, time.monotonic() - filling.started)
        failed = int((shard.status != Status.OK).sum())
        say(f"{shard.path}: {shard.rows:,} rows, {failed:,} failed")

    if shards:
        with counter(rows, "rows") as bar:
            Pipeline(tower, config, bar, finished).run(shards)
    return time.monotonic() - started


def conclude(config: Encoding, figures: JsonDict, seconds: float) -> JsonDict:
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
    return {**figures, "seconds": round(seconds, 2), "out": str(config.out)}


def _plan(config: RunConfig, sources: Sequence[Source], tower: VisionTower) -> JsonDict:
    rows = sum(source.rows for source in sources)
    folder = next(path for path in (config.out, *config.out.resolve().parents) if path.exists())
    figures = {
        "files": len(sources),
        "rows": rows,
        "finished_shards": sum(is_finished(config.out / f"{source.stem}.h5") for source in sources),
        "unfinished_shards": sum(part_of(config.out / f"{source.stem}.h5").exists() for source in sources),
        "feature_bytes": rows * tower.tokens * tower.width * FEATURE_TYPE.itemsize,
        "free_bytes": shutil.disk_usage(folder).free,
    }
    shown = [human_bytes(value) if "bytes" in key else f"{value:,}" for key, value in figures.items()]
    print(table(list(zip((key.replace("_", " ") for key in figures), shown, strict=True))))
    return figures
