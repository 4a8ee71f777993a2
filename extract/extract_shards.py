"""Filling shards with one vision tower: what `extract run` does alone, and each worker of a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from extract.config import Encoding, RunConfig
from extract.open_shard import Filling
from extract.outcomes import write_statistics
from extract.pipeline import Pipeline
from extract.sources.base import Rows, Source
from extract.sources.local_images import changed
from llava_core.cli.console import counted, progress, say
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.row_status import Status
from llava_core.shards.format import ShardHeader
from llava_core.shards.layout import Layout
from llava_core.shards.part_file import is_finished
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter, require_storage
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower


def open_tower(config: Encoding) -> VisionTower:
    return open_vision_tower(
        config.vision, pick_device(config.device), layer=config.layer, decode=config.decode
    )


def describe(tower: VisionTower) -> str:
    return (
        f"frozen: {tower.encoder['model_id']} on {tower.device} in {tower.encoder['dtype']}, "
        f"[{tower.tokens}, {tower.width}] an image; fingerprint {tower.identity.fingerprint[:12]}"
    )


def is_done(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> bool:
    """Whether the shard is finished, and its image files are what they were.

    Raises LlavaError if it is one of another encoder or other rows.
    """
    if not is_finished(path):
        return False
    shard = Shard(path)
    require_same(path, shard, tower)
    if shard.source != source.identity():
        raise LlavaError(
            f"{path} was made from another file, or from other rows of it",
            expected=source.identity(),
            got=shard.source,
            do="choose another --out, mend --limit, or delete that shard",
        )
    require_storage(path, shard.layout, config.dtype)
    _mention_thumbnails(path, shard.layout, config)
    rows = changed(source.images, shard)
    if rows.any():
        _mention_changed(path, shard.urls(), rows)
    return not rows.any()


def _mention_changed(path: Path, places: Sequence[str], changed: np.ndarray) -> None:
    rows = np.flatnonzero(changed).tolist()
    images = counted(len(rows), "image")
    say(f"{path}: {images} changed since encoded, such as {places[rows[0]]}; encoding again")


def _mention_thumbnails(path: Path, layout: Layout, config: RunConfig) -> None:
    if config.thumbnails and not layout.thumbnails:
        say(f"{path} was begun without --thumbnails and stays so; delete it to make it anew with them")


def require_same(path: Path, shard: Shard, tower: VisionTower) -> None:
    """Raise LlavaError unless the shard at `path` holds features of this encoder."""
    shard.identity.require_same(
        tower.identity,
        f"{path} holds features of another encoder",
        do="use that encoder, or choose another --out",
    )


def open_filling(path: Path, source: Source, tower: VisionTower, config: RunConfig) -> Filling:
    again = changed(source.images, Shard(path)) if is_finished(path) else np.zeros(0, bool)
    return filling_of(path, source.read(), source.identity(), tower, config, again, source.images)


def filling_of(
    path: Path,
    rows: Rows,
    source: JsonDict,
    tower: VisionTower,
    config: RunConfig,
    again: np.ndarray | tuple[()] = (),
    images: Path | None = None,
) -> Filling:
    """Begin, or continue, the shard of these rows; `source` is what it remembers of where they are from.

    Of a finished shard, fill the rows in the mask `again` anew; of one that was begun, those whose file in
    the folder `images` has changed since.
    """
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
    writer = ShardWriter(path, header, again if np.any(again) else ())
    _mention_thumbnails(writer.part, writer.layout, config)
    if images is not None and (found := changed(images, writer, rows.places)).any():
        _mention_changed(path, rows.places, found)
        writer.make_again(found)
    return Filling(writer, rows.places, rows.texts, rows.images)


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
