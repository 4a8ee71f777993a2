"""Extracts shards with one vision tower: in `extract run`, and in each worker of a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from extract.config import EncodeConfig, RetryConfig, RunConfig
from extract.deduplicate import Deduplicator
from extract.open_output import OpenOutput
from extract.open_shard import OpenShard
from extract.pipeline import run_pipeline
from extract.sources.base import Columns, Source, described, is_address
from extract.sources.local_images import changed
from extract.stages.metrics import ProgressBar
from extract.statistics import summarise, write_statistics
from llava_core.cli.console import counted, progress, say
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import shard_paths
from llava_core.network.async_tasks import run_async
from llava_core.row_status import Status
from llava_core.shards.byte_offsets import Layout
from llava_core.shards.dialogue import stored_dialogue
from llava_core.shards.hdf5_file import ShardHeader, read_layout
from llava_core.shards.part_file import is_finished, journal_of, part_of
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter, require_storage
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower


def open_tower(config: RunConfig | RetryConfig, recorded: EncoderIdentity | None = None) -> VisionTower:
    """The encoder as the flags say; where they have their defaults, as features record it."""
    flags: JsonDict = {"layer": config.layer, "decode": config.decode, "fit": config.fit}
    if recorded:
        given = {name: v for name, v in flags.items() if v != getattr(EncodeConfig, name)}
        for name, value in given.items():
            if value != recorded.flags[name]:
                expected = f"{recorded.flags[name]}, as the shards have it"
                raise LlavaError(f"--{name}", expected=expected, got=value, do="leave it out", exit_code=2)
        flags = recorded.flags
    assert isinstance(config.vision, Path)
    return open_vision_tower(config.vision, pick_device(config.device), **flags)


def open_towers(caches: Sequence[RunConfig]) -> list[VisionTower]:
    """The encoder of each cache; of several layers of one, the network is in memory once.

    Raises LlavaError (wrong usage) if two are the same layer.
    """
    towers: list[VisionTower] = []
    for config in caches:
        opened = [
            tower for tower, other in zip(towers, caches, strict=False) if other.vision == config.vision
        ]
        tower = (opened[0].at(config.layer) if opened else None) or open_tower(config)
        for other, its in zip(caches, towers, strict=False):
            if its.identity.fingerprint == tower.identity.fingerprint:
                what = f"{other.out.name} and {config.out.name} are the same features"
                raise LlavaError(what, do="leave one out", exit_code=2)
        towers.append(tower)
    return towers


def describe(tower: VisionTower) -> str:
    return (
        f"frozen: {tower.identity.name} on {tower.device} in {tower.encoder['dtype']}, "
        f"[{tower.tokens}, {tower.width}] an image; fingerprint {tower.identity.fingerprint[:12]}"
    )


def finished_shard(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> Shard | None:
    """The shard, if it is finished, and neither its words nor its image files have changed since.

    Raises LlavaError if it is of another encoder or of other rows.
    """
    _settle_part(path, source, tower, config)
    if not is_finished(path):
        return None
    shard = Shard(path)
    require_same(path, shard, tower)
    identity = source.identity()
    if shard.source != identity:
        if (rows := _changed_words(shard, source, identity)) is not None:
            require_storage(path, shard.layout, config.dtype)
            _mention_thumbnails(path, shard.layout, config)
            what = f"the texts of {counted(rows, 'row')} changed" if rows else "its source was written anew"
            say(f"{path}: {what}; its images are not encoded again")
            return None
        raise LlavaError(
            f"{path} was made from another file, or from other rows of it",
            expected=described(identity),
            got=described(shard.source),
            do="choose another --out, correct --limit, or delete that shard",
        )
    require_storage(path, shard.layout, config.dtype)
    _mention_thumbnails(path, shard.layout, config)
    redo = changed(source.images, shard)
    if redo.any():
        _mention_changed(path, shard.urls(), redo)
        return None
    return shard


def _settle_part(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> None:
    """End a part that was begun for other words than those of `source`.

    What it has encoded becomes the shard, to be mended as a finished one is; but a mend is begun again.
    """
    part = part_of(path)
    try:
        begun = read_layout(part)
    except FileNotFoundError:
        return
    identity, own = source.identity(), (tower.identity.fingerprint, config.dtype)
    if begun.source == identity or (begun.identity.fingerprint, begun.storage) != own:
        return
    if path.exists() and Shard(path).source != begun.source:
        with Lock(path):
            part.unlink(missing_ok=True)
            journal_of(path).unlink(missing_ok=True)
        say(f"{part} was begun with texts that have changed since, and is started again")
        return
    with ShardWriter(path) as writer:
        writer.write_columns()
        if _changed_words(Shard(part), source, identity) is not None:
            reason = "not reached before its words changed"
            left = np.flatnonzero(~writer.done).tolist()
            writer.write([RowRecord(row, Status.NO_FILE, reason=reason) for row in left])
            writer.finish()


def _changed_words(shard: Shard, source: Source, identity: JsonDict) -> int | None:
    """Number of rows whose words differ; None if any other thing does."""
    if (shard.rows, shard.source.get("name")) != (identity["rows"], identity["name"]):
        return None
    columns = source.read()
    if (shard.urls(), [shard.id(row) for row in range(shard.rows)]) != (columns.image_refs, columns.ids):
        return None
    words = (stored_dialogue(text or "", columns.conversations) for text in columns.captions)
    return sum(shard.dialogue(row) != dialogue for row, dialogue in enumerate(words))


def _mention_changed(path: Path, image_refs: Sequence[str], changed: np.ndarray) -> None:
    rows = np.flatnonzero(changed).tolist()
    images = counted(len(rows), "image")
    say(f"{path}: {images} changed since encoded, such as {image_refs[rows[0]]}; encoding again")


def _mention_thumbnails(path: Path, layout: Layout, config: RunConfig) -> None:
    if config.thumbnails and not layout.thumbnails:
        say(f"{path} was begun without --thumbnails and stays so; delete it to make it again with them")


def require_same(path: Path, shard: Shard, tower: VisionTower) -> None:
    """Raise LlavaError unless the shard at `path` holds features of this encoder."""
    remedy = shard.identity.remedy(tower.identity)
    shard.identity.require_same(
        tower.identity,
        f"{path} holds features of another encoder" + (" or preprocessing" if remedy else ""),
        do=f"{remedy or 'use that encoder'}, or choose another --out",
    )


def open_shard(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> OpenShard:
    """Create or continue the shard of a source.

    Of a finished one, redo the rows whose image has changed, or, if its words have, replace it by another
    with the same features.
    """
    identity = source.identity()
    if not path.exists():
        return open_shard_of(path, source.read(), identity, tower, config, images=source.images)
    old, finished = Shard(path), is_finished(path)
    redo = changed(source.images, old)
    mended = finished and old.source != identity  # the writer asks again, under its lock
    if mended:
        config = dataclasses.replace(config, thumbnails=old.layout.thumbnails)
    return open_shard_of(
        path,
        source.read(),
        identity,
        tower,
        config,
        redo if finished and not mended else (),
        source.images,
        replace=mended,
        kept=_kept(old, ~redo),
    )


def _kept(old: Shard, same: np.ndarray) -> dict[int, Shard]:
    """Rows whose features stay: their image is at the same address, or its file is the same or gone.

    What a table or an archive stores is read again, and recognised by its sha256.
    """
    files, urls = old.mtime, old.urls()
    return {row: old for row in old.ok_rows() if same[row] and (files[row] or is_address(urls[row]))}


def open_shard_of(
    path: Path,
    columns: Columns,
    source: JsonDict,
    tower: VisionTower,
    config: RunConfig,
    redo: np.ndarray | tuple[()] = (),
    images: Path | None = None,
    replace: bool = False,
    kept: Mapping[int, Shard] = MappingProxyType({}),
) -> OpenShard:
    """Create or continue the shard of these columns; `source` is the identity of their source.

    With `replace`, a finished shard with other words stays until this one is finished. `kept`: rows whose
    features it has.

    `redo`: mask of the rows of a finished shard to encode anew. Of an unfinished shard, rows whose file in
    the folder `images` has changed are encoded anew.
    """
    header = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source=source,
        tokens=tower.tokens,
        width=tower.width,
        captions=[caption or "" for caption in columns.captions],
        urls=columns.image_refs,
        ids=columns.ids,
        storage=config.dtype,
        thumbnails=config.thumbnails,
        conversations=columns.conversations,
        local=columns.images is not None,
    )
    writer = ShardWriter(path, header, redo if np.any(redo) else (), replace)
    _mention_thumbnails(writer.part, writer.layout, config)
    if images is not None and (found := changed(images, writer, columns.image_refs)).any():
        _mention_changed(path, columns.image_refs, found)
        writer.make_again(found)
    return OpenShard(writer, columns.image_refs, columns.captions, columns.images, columns.outcomes, kept)


def extract(
    config: EncodeConfig,
    towers: Sequence[VisionTower],
    openers: Sequence[Sequence[Callable[[], OpenOutput]]],
    finished: Sequence[Shard],
    rows: int,
    bar: ProgressBar | None = None,
) -> JsonDict:
    """Write these shards; returns seconds, and, if there was anything to do, the figures of the stages.

    `openers`: of each source, those of its shards, in the caches of these towers. Rows that a shard of the
    same cache in `finished` has are copied. `bar` counts the `rows` of all; without it, a progress bar does.
    """
    started = time.monotonic()
    if not openers:
        return {"seconds": 0.0}

    def done(shard: Shard, seconds: float) -> None:
        write_statistics(shard, seconds, config)
        say(f"{shard.path}: {shard.rows:,} rows, {summarise([shard])['failed']:,} failed")

    deduplicator = Deduplicator(finished)
    with contextlib.nullcontext(bar) if bar else progress(rows, "rows") as counter:
        figures = run_async(run_pipeline(towers, config, openers, counter, done, deduplicator))
    if config.reuse:
        given = {path for folder in config.reuse for path in shard_paths(folder)}
        reused = sum(deduplicator.copied[path] for path in given)
        say(f"{counted(reused, 'row')} copied from --reuse")
    return {"seconds": round(time.monotonic() - started, 2), **figures}
