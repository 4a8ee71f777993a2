"""`extract bench --features`: read throughput of a cache, as training reads it and through h5py."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llava_core.cli.console import counted, progress, say, show, table
from llava_core.errors import LlavaError
from llava_core.filesystem import fsync
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import read_by_hdf5
from llava_core.shards.quantize import FEATURE_TYPE
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict

BATCH, THREADS = 16, 2
"""Rows of a batch, and threads that read it, as in training."""
REPEATS = 3
"""Times that rows are read from memory; the fastest counts."""

Row = tuple[int, int]
"""Index of a shard, and a row of it."""
Read = Callable[[int, int, np.ndarray], None]
"""Reads the features of a row of a shard into an array."""


def read_rates(folder: Path, count: int) -> JsonDict:
    """Print a table of samples/s and bytes/s of `count` random rows, read in four ways; returns its figures.

    Cold rates are null where the system cannot drop files from its cache.
    """
    shards = open_shards(folder)
    usable = [(s, row) for s, shard in enumerate(shards) for row in shard.ok_rows()]
    if not usable:
        raise LlavaError(
            f"no row with features in {folder}", do="look at the failures with `extract inspect`"
        )
    rows = random.Random(0).sample(usable, min(count, len(usable)))
    row_bytes = sum(shards[s].layout.row_bytes for s, _ in rows) / len(rows)  # fp16 and int8 may lie mixed
    say(
        f"{len(rows):,} of {len(usable):,} rows in {counted(len(shards), 'shard')}, "
        f"{row_bytes:,.0f} bytes each"
    )
    rates: dict[str, float | None] = {}
    with contextlib.ExitStack() as stack, progress(2 * (1 + REPEATS) * len(rows), "rows") as bar:
        files = {s: stack.enter_context(read_by_hdf5(shards[s].path)) for s in sorted({s for s, _ in rows})}

        def by_hdf5(s: int, row: int, out: np.ndarray) -> None:
            out[:] = files[s](row)

        def as_training(s: int, row: int, out: np.ndarray) -> None:
            shards[s].read_into(row, out)

        for way, read in (("as training", as_training), ("h5py", by_hdf5)):
            for temperature, repeats in (("cold", 1), ("warm", REPEATS)):
                cold = temperature == "cold"
                dropped = cold and drop_from_cache(shards)
                seconds = min(_seconds(read, shards[0], rows, bar.update) for _ in range(repeats))
                rates[f"{way}, {temperature}"] = len(rows) / seconds if dropped or not cold else None
    lines = [
        (way, *((f"{rate:,.0f}", f"{rate * row_bytes / 1e9:.2f}") if rate else ("-", "-")))
        for way, rate in rates.items()
    ]
    show(table(lines, ("read", "samples/s", "GB/s")))
    ways = {
        way.replace(", ", "_").replace(" ", "_"): rate
        and {"samples_per_s": rate, "bytes_per_s": rate * row_bytes}
        for way, rate in rates.items()
    }
    return {"rows": len(usable), "measured_rows": len(rows), "row_bytes": row_bytes, **ways}


def drop_from_cache(shards: Sequence[Shard]) -> bool:
    """Drop these files from the system's cache; returns whether the system can."""
    if not hasattr(os, "posix_fadvise"):  # macOS
        return False
    for shard in shards:
        with shard.path.open("rb") as file:
            fsync(shard.path)  # pages that are not on disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _seconds(read: Read, shard: Shard, rows: Sequence[Row], done: Callable[[int], object]) -> float:
    """Seconds to read `rows` in batches; all have the shape of the shard's rows."""

    def batch(start: int) -> None:
        taken = rows[start : start + BATCH]
        out = np.empty((len(taken), shard.tokens, shard.width), FEATURE_TYPE)
        for place, row in zip(out, taken, strict=True):
            read(*row, place)

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS, "read") as pool:
        list(pool.map(batch, range(0, len(rows), BATCH)))
    seconds = time.perf_counter() - began
    done(len(rows))
    return seconds
