"""A shard of the small world's pictures, with captions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from llava_core.row_status import Status
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import Folders

CAPTIONS = ["红色的圆", "蓝色的圆", "红的", "a 圆 b", ""]
DEAD = 1
"""The row that has no features."""


def models(world: Folders) -> dict[str, Any]:
    """Fields of a configuration that answers."""
    folders = {"checkpoint": world.checkpoint, "vision": world.vision, "llm": world.llm}
    return {**folders, "device": "cpu", "max_tokens": 8}


def write_features(world: Folders, path: Path, layer: int | None = None) -> Path:
    """Row i is picture i; row DEAD was a dead link. Returns the path."""
    tower = open_vision_tower(world.vision, layer=layer)
    records = []
    for row, image in enumerate(world.images):
        data = image.read_bytes()
        features = tower.encode(tower.preprocess.decode_image(data).pixels[None])[0].numpy().astype("<f2")
        digest = hashlib.sha256(data).digest()
        record = RowRecord(row, Status.OK, features, 200, 1, len(data), (30, 40), digest)
        records.append(RowRecord(row, Status.HTTP_4XX, http=404) if row == DEAD else record)
    header = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source={"name": "part.parquet", "rows": len(CAPTIONS), "sha256": "1" * 64},
        tokens=tower.tokens,
        width=tower.width,
        captions=CAPTIONS,
        urls=[""] * len(CAPTIONS),
        ids=["", "", "c", "d", "e"],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path, header) as writer:
        writer.write(records)
        writer.finish()
    return path
