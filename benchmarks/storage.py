"""What int8 costs and saves: the same rows stored as fp16 and as int8, then read as training reads them.

    python -m benchmarks.storage --features demo-out/features/train
    python -m benchmarks.storage --rows 2000

Without --features the rows are random, in the shape of Chinese-CLIP ViT-B/16.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import tyro

from extract.bench.read_throughput import drop_from_cache
from llava_core.cli.console import table
from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.quantize import STORAGES
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter

TOKENS, WIDTH = 197, 768
BATCH = 16
WRITE_ROWS = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    features: Path | None = None
    """Folder of fp16 shards whose features to take."""
    rows: int = 2000
    """Most rows to store."""
    threads: int = 2
    """Readers, as many as the training loader has."""
    repeats: int = 5
    """Times everything is read; the fastest counts."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    lines = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for storage in STORAGES:
            rows = list(rows_of(settings))
            (tokens, width), texts = rows[0].shape, ["x"] * len(rows)
            header = ShardHeader({}, {}, {}, tokens, width, texts, texts, texts, storage)
            path = Path(folder) / f"{storage}.h5"
            started = time.perf_counter()
            with ShardWriter(path, header) as writer:
                for start in range(0, len(rows), WRITE_ROWS):
                    part = range(start, min(start + WRITE_ROWS, len(rows)))
                    writer.write([RowRecord(i, Status.OK, rows[i]) for i in part])
                writer.finish()
            written = time.perf_counter() - started
            shard = Shard(path)
            errors = [distance(rows[i], shard.read(i)) for i in range(len(rows))]
            cold = read(shard, settings.threads, cold=True)
            first = min(read(Shard(path), settings.threads) for _ in range(settings.repeats))
            hot = min(read(shard, settings.threads) for _ in range(settings.repeats))
            one = min(read(shard, 1) for _ in range(settings.repeats))
            rate = [f"{len(rows) / seconds:,.0f}" for seconds in (written, cold, first, hot, one)]
            lines.append(
                (storage, f"{path.stat().st_size:,}", f"{np.mean(errors):.1e}", f"{max(errors):.1e}", *rate)
            )
    print(
        f"{len(rows)} rows of {list(rows[0].shape)}, torch threads: {torch.get_num_threads()}; rows a second:"
    )
    read_by = (f"read cold, {settings.threads} threads", "hot, first time", "hot, again", "hot, 1 thread")
    print(table(lines, ("storage", "file bytes", "mean error", "largest", "written", *read_by)))


def rows_of(settings: Settings) -> Iterator[np.ndarray]:
    """fp16 [T, D] each."""
    if settings.features is None:
        rng = np.random.default_rng(0)
        spread = rng.lognormal(size=WIDTH).astype(np.float32)
        for _ in range(settings.rows):
            yield (rng.standard_normal((TOKENS, WIDTH), np.float32) * spread).astype(np.float16)
        return
    usable = ((shard, row) for shard in open_shards(settings.features) for row in shard.ok_rows())
    for (shard, row), _ in zip(usable, range(settings.rows), strict=False):
        yield shard.read(row)


def distance(before: np.ndarray, after: np.ndarray) -> float:
    """Relative."""
    exact = before.astype(np.float32)
    return float(np.linalg.norm(after.astype(np.float32) - exact) / np.linalg.norm(exact))


def read(shard: Shard, threads: int, cold: bool = False) -> float:
    """Seconds in which all rows are read in batches, in a random order."""
    if cold:
        drop_from_cache([shard])
    order = np.random.default_rng(0).permutation(shard.rows).tolist()

    def batch(start: int) -> None:
        taken = order[start : start + BATCH]
        out = np.empty((len(taken), shard.tokens, shard.width), np.float16)
        for place, row in zip(out, taken, strict=True):
            shard.read_into(row, place)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(batch, range(0, shard.rows, BATCH)))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
