"""`extract run` and `extract retry-failed`: choose the shards, extract them, print the summary."""

from __future__ import annotations

import functools
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from extract.config import EncodeConfig, RetryConfig, RunConfig
from extract.extract_shards import (
    describe,
    extract,
    finished_shard,
    open_shard,
    open_tower,
    open_towers,
    require_same,
)
from extract.failed_files import failed_lines
from extract.open_output import OpenOutput
from extract.open_shard import OpenShard
from extract.open_tar import OpenTar, is_kept
from extract.partition import limits_of, partition
from extract.ray_driver import extract_on_ray
from extract.sources.base import DataFlags, Source
from extract.sources.find import find_sources, sources_of
from extract.statistics import TOO_MANY_FAILED, outcome_table, summarise
from llava_core.cli.console import counted, human_bytes, say, show, table
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError
from llava_core.filesystem import nearest_existing
from llava_core.launcher_variables import worker_index
from llava_core.row_status import Failure, Status, failures
from llava_core.shards.byte_offsets import disk_bytes
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import read_layout
from llava_core.shards.part_file import is_finished, part_of
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from llava_core.types import JsonDict
from llava_core.vision.tower import VisionTower

HEADER_FLAGS = ("header", "referer", "user_agent")
"""Flags whose values no message shows."""

T = TypeVar("T")
Flags = TypeVar("Flags", bound=EncodeConfig)


def run(config: RunConfig) -> JsonDict:
    """Extract every source that has no finished shard; returns the figures of the summary."""
    sources, config = _part(find_sources(config.data, DataFlags.of(config), config.limit), "sources", config)
    if not sources:
        return _nothing(config)
    caches = config.caches()
    for cache in caches:
        _require_other_names({source: _shard(cache, source) for source in sources})
    if config.ray is not None and not config.dry_run:
        started = time.monotonic()
        figures = extract_on_ray(config, sources)
        return conclude(config, figures, {"seconds": round(time.monotonic() - started, 2)})
    towers = open_towers(caches)
    for tower in towers:
        say(describe(tower))
    if config.dry_run:
        plans = []
        for cache, tower in zip(caches, towers, strict=True):
            _show_name(cache, config)
            plans.append(_plan(cache, tower, sources))
        if len(plans) > 1:
            together = human_bytes(sum(plan["disk_bytes"] for plan in plans))
            say(f"{counted(len(plans), 'cache')} take {together} of disk together")
        if config.keep_images is not None:
            say("the image files that --keep-images keeps come on top; how large they are is not known yet")
        return _of_all(caches, plans)
    finished = _reused(config, towers, config.dtype)
    openers: list[list[Callable[[], OpenOutput]]] = []
    done: dict[Path, Shard | None] = {}
    rows = to_go = tars = 0
    for source in sources:
        todo: list[Callable[[], OpenOutput]] = []
        for cache, tower in zip(caches, towers, strict=True):
            path = _shard(cache, source)
            done[path] = finished_shard(path, source, tower, cache)
            if path.exists():
                finished.append(done[path] or Shard(path))
            if done[path] is None:
                todo.append(functools.partial(open_shard, path, source, tower, cache))
        to_go += len(todo)
        if config.keep_images is not None:
            tar = config.keep_images / f"{source.stem}.tar"
            if not is_kept(tar, source):
                todo.append(functools.partial(OpenTar, tar, source))
                tars += 1
        rows += len(todo) * source.rows
        openers.append(todo)
    shards = len(sources) * len(caches)
    left = [translated(f"{shards - to_go} shards are finished, {to_go} to go")] * bool(to_go)
    left += [translated(f"the images of {counted(tars, 'source')} are to be kept")] * bool(tars)
    found = f"{counted(sum(source.rows for source in sources), 'row')} in {counted(len(sources), 'source')}"
    say(f"{found}; {', '.join(left) or 'nothing to do'}")
    speed = extract(config, towers, [todo for todo in openers if todo], finished, rows)
    all_figures = []
    for cache in caches:
        _show_name(cache, config)
        paths = [_shard(cache, source) for source in sources]
        figures = summarise([done[path] or Shard(path) for path in paths])
        all_figures.append(conclude(cache, figures, speed if cache is caches[-1] else {}))
    return _of_all(caches, all_figures)


def _shard(config: EncodeConfig, source: Source) -> Path:
    return config.out / f"{source.stem}.h5"


def _show_name(cache: RunConfig, config: RunConfig) -> None:
    """Print the name of one of several caches above its figures."""
    if cache is not config:
        show(f"{cache.out.name}:")


def _of_all(caches: Sequence[RunConfig], all_figures: Sequence[JsonDict]) -> JsonDict:
    """The figures of a cache; of several, by their names."""
    if len(caches) == 1:
        return all_figures[0]
    named = {cache.out.name: figures for cache, figures in zip(caches, all_figures, strict=True)}
    codes = [figures.pop("exit_code") for figures in all_figures if "exit_code" in figures]
    return {"caches": named, **({"exit_code": codes[0]} if codes else {})}


def _reused(config: EncodeConfig, towers: Sequence[VisionTower], storage: str) -> list[Shard]:
    """The shards of --reuse. Raises LlavaError if one is of none of these encoders, or stored otherwise."""
    shards = [shard for folder in config.reuse for shard in open_shards(folder)]
    for shard in shards:
        what = f"--reuse: the features in {shard.path}"
        if all(shard.identity.differences(tower.identity) for tower in towers):
            expected = " or ".join(str(tower.identity) for tower in towers)
            different = shard.identity.differences(towers[0].identity)[0]
            raise LlavaError(what, expected=expected, got=f"{shard.identity}: {different}", do="leave it out")
        if (stored := shard.layout.storage) != storage:
            raise LlavaError(what, expected=storage, got=stored, do="leave it out, or use the same --dtype")
    return shards


def retry_failed(config: RetryConfig) -> JsonDict:
    """Retry the failed rows of finished shards; returns the figures of the summary."""
    chosen = failures(config.status)
    shards, config = _part(open_shards(config.out), "shards", config)
    if not shards:
        return _nothing(config)
    tower = open_tower(config, shards[0].identity)
    say(describe(tower))
    require_same(shards[0].path, shards[0], tower)
    for shard in shards:
        if not is_finished(shard.path) and read_layout(part_of(shard.path)).source != shard.source:
            what = f"{shard.path} is being made again, with other texts"
            raise LlavaError(what, do="let `extract run` finish that first")
    counts = {shard.path: int(shard.failed(chosen).sum()) for shard in shards}
    todo = [shard for shard in shards if counts[shard.path] or not is_finished(shard.path)]
    say(f"{counted(sum(counts.values()), 'failed row')} in {len(todo)} of {len(shards)} shards to try again")
    sources = sources_of(todo, config.data, DataFlags.of(config))
    openers = [
        [functools.partial(_reopen, shard, chosen, source)]
        for shard, source in zip(todo, sources, strict=True)
    ]
    finished = [*_reused(config, [tower], shards[0].layout.storage), *shards]
    speed = extract(config, [tower], openers, finished, sum(shard.rows for shard in todo))
    return conclude(config, summarise([Shard(shard.path) for shard in shards]), speed)


def _require_other_names(paths: dict[Source, Path]) -> None:
    """Raise LlavaError if a shard would overwrite what it is made from, or is there under a shorter name."""
    for source, path in paths.items():
        if source.path.resolve() == path.with_suffix(".json").resolve():
            raise LlavaError(
                f"the statistics beside {path} would overwrite {source.path}", do="choose another --out"
            )
        if source.prefix and (old := path.with_name(f"{source.name}.h5")).exists():
            raise LlavaError(
                f"{old} was made when only one file was called {source.path.name}",
                do=f"rename it to the one that it was made from, such as {path.name}, its .json too",
            )


def _part(things: Sequence[T], noun: str, config: Flags) -> tuple[list[T], Flags]:
    """This worker's part of the files, and the flags with its part of the limits."""
    this = worker_index()
    part = partition(things, this)
    if this.world_size > 1:
        say(f"worker {this.rank + 1} of {this.world_size}: {len(part)} of {len(things)} {noun}")
    return part, limits_of(config, this)


def _nothing(config: EncodeConfig) -> JsonDict:
    say("no file is left for this worker; done")
    return {**summarise([]), "seconds": 0.0, "out": str(config.out)}


def _reopen(shard: Shard, chosen: Sequence[Failure], source: Source | None) -> OpenShard:
    images = source.read().images if source else None
    writer = ShardWriter(shard.path, retry=chosen)
    urls = shard.urls()
    captions = [shard.caption(row) or None for row in range(shard.rows)]
    return OpenShard(writer, urls, captions, images)


def conclude(config: RunConfig | RetryConfig, figures: JsonDict, speed: JsonDict) -> JsonDict:
    """Print the summary; returns its figures."""
    share = figures["failed"] / figures["rows"]
    if "bottleneck" in speed:
        busy = ", ".join(
            translated("{} busy {:.0%}").format(name, stage["busy"])
            for name, stage in speed["stages"].items()
        )
        say(f"{speed['seconds']:,.0f} s, bounded by {speed['bottleneck']} ({busy} of the time)")
    if figures["failed_hosts"]:
        hosts = ", ".join(f"{host} ({n:,})" for host, n in figures["failed_hosts"].items())
        say(f"most failures: {hosts}")
    for line in failed_lines(figures):
        say(line)
    show(outcome_table(figures))  # after the lines on standard error, which the demo does not relay
    if share > config.max_failed:
        say(f"{share:.1%} of the rows failed, over --max-failed {config.max_failed:g}")
        figures["exit_code"] = TOO_MANY_FAILED
        for line in _advice(config, figures):
            say(line)
    return {**figures, **speed, "out": str(config.out)}


def _advice(config: RunConfig | RetryConfig, figures: JsonDict) -> Iterator[str]:
    """What helps with the failures that there are."""
    by_status = figures["by_status"]
    failed = {status: n for status in Status if status.failed and (n := by_status.get(status.label, 0))}
    if Status.BAD_CAPTION in failed:
        rows = counted(failed[Status.BAD_CAPTION], "row")
        yield f"{rows} without text: correct them in --data, and run the same command again"
    if Status.SEVERAL_IMAGES in failed:
        rows = counted(failed[Status.SEVERAL_IMAGES], "row")
        yield f"{rows} about several images: a row may have one; --max-failed accepts a larger share"
    if not all(status.in_data for status in failed):
        own = [f"--{name.replace('_', '-')}" for name in HEADER_FLAGS if getattr(config, name)]
        if not own and {"401", "403"} & figures["by_http"].get(Status.HTTP_4XX.label, {}).keys():
            yield "HTTP 401 or 403: the host may want --referer ADDRESS or --header NAME:VALUE"
        private = ["--allow-private"] * (config.allow_private or Status.FORBIDDEN_ADDRESS in failed)
        flags = ["--out", str(config.out), "--vision", str(config.vision), *private]
        command = f"python -m extract retry-failed {shlex.join(flags)}"
        yield f"to try again: {command}" + (f" with the same {', '.join(own)}" if own else "")


def _plan(config: RunConfig, tower: VisionTower, sources: Sequence[Source]) -> JsonDict:
    rows = sum(source.rows for source in sources)
    figures = {
        "sources": len(sources),
        "rows": rows,
        "finished_shards": sum(is_finished(config.out / f"{source.stem}.h5") for source in sources),
        "unfinished_shards": sum(part_of(config.out / f"{source.stem}.h5").exists() for source in sources),
        "disk_bytes": rows * disk_bytes(config.dtype, tower.tokens, tower.width, config.thumbnails),
        "free_bytes": shutil.disk_usage(nearest_existing(config.out)).free,
    }
    shown = [human_bytes(value) if "bytes" in key else f"{value:,}" for key, value in figures.items()]
    show(table(list(zip((key.replace("_", " ") for key in figures), shown, strict=True))))
    return figures
