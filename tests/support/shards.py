"""Feature shards with random features."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from llava_core.row_status import Status
from llava_core.shards import file_checksums
from llava_core.shards.byte_offsets import COLUMNS
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.quantize import Storage, checksum
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.types import JsonDict

TOKENS, WIDTH = 5, 12
CAPTIONS = ("红色的圆形", "a blue square", "左上角有一个大的黄色三角形，右侧有一个小的绿色菱形。", "two dots")


def header(captions: Sequence[str], name: str = "part.parquet", **preprocess: object) -> ShardHeader:
    encoder: JsonDict = {
        "model_id": "random",
        "weights_sha256": "0" * 64,
        "layer": None,
        "tokens": TOKENS,
        "width": WIDTH,
        "dtype": "float32",
    }
    return ShardHeader(
        encoder=encoder,
        preprocess={"size": 32, "filter": "bicubic", "mean": [0.5] * 3, **preprocess},
        source={"name": name, "rows": len(captions), "sha256": "1" * 64},
        tokens=TOKENS,
        width=WIDTH,
        captions=list(captions),
        urls=[f"http://example.org/{i}.jpg" for i in range(len(captions))],
        ids=[str(i) for i in range(len(captions))],
    )


def features_of(row: int, seed: int = 0) -> np.ndarray:
    """What row `row` of such a shard holds: fp16 [TOKENS, WIDTH]."""
    return np.random.default_rng([seed, row]).normal(size=(TOKENS, WIDTH)).astype("<f2")


def outcome(row: int, seed: int = 0) -> RowRecord:
    content = str(row).encode()
    return RowRecord(
        row, Status.OK, features_of(row, seed), 200, 1, len(content), (40, 30 + row), _digest(content)
    )


def _digest(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(32, "big")


def write_shard(
    path: Path,
    rows: int = 12,
    failed: Sequence[int] = (),
    seed: int = 0,
    storage: Storage = "float16",
    caption: str = "",
    **preprocess: object,
) -> Path:
    """A finished shard of so many rows, those in `failed` dead links; returns its path."""
    captions = [f"{caption or CAPTIONS[i % len(CAPTIONS)]}{i}" for i in range(rows)]
    made = dataclasses.replace(header(captions, path.stem + ".parquet", **preprocess), storage=storage)
    with ShardWriter(path, made) as writer:
        writer.write(
            [
                RowRecord(i, Status.HTTP_4XX, http=404) if i in failed else outcome(i, seed)
                for i in range(rows)
            ]
        )
        writer.finish()
    return path


def reseal(path: Path) -> None:
    """Make the checksums of a whole shard fit what was changed in it by hand."""
    with h5py.File(path) as file:
        held = [name for name in (*COLUMNS, "mtime") if name in file]
        columns = checksum([np.ascontiguousarray(file[name][:]) for name in held])
    with path.open("r+b") as plain:
        _put(plain, file_checksums.SIZE, path.stat().st_size)
        _put(plain, file_checksums.SHARED, file_checksums.shared_checksum(plain))
        _put(plain, file_checksums.COLUMNS, columns)


def _put(file: BinaryIO, place: int, number: int) -> None:
    file.seek(place * file_checksums.NUMBER.itemsize)
    file.write(number.to_bytes(file_checksums.NUMBER.itemsize, "little"))
