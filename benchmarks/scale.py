"""What large data costs before the first step: python -m benchmarks.scale [--rows 1000000]

Shards of captions with features of a few numbers each, so that texts and columns dominate as they do not in
practice. CPU seconds, and growth of the process's peak memory, of a process of its own for each line.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_core.cli.console import table
from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter

SHARD_ROWS = 100_000
TOKENS, WIDTH = 1, 8
Figures = tuple[float, float]
"""CPU seconds, and MiB of memory at the peak above that before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        features = Path(folder)
        write_shards(features, rows)
        lines = []
        jobs = {"shards opened": opened, "and their usable rows": usable, "and their identity": identity}
        for name, job in jobs.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, mebibytes = pool.apply(measured, (job, features))
            lines.append((name, f"{seconds:.2f}", f"{mebibytes:.0f}"))
    print(table(lines, (f"{rows:,} rows", "CPU, s", "memory, MiB")))


def write_shards(folder: Path, rows: int) -> None:
    rng = random.Random(0)
    words = [caption(random_scene(rng), rng) for _ in range(1000)]
    features = np.zeros((TOKENS, WIDTH), "<f2")
    for start in range(0, rows, SHARD_ROWS):
        names = [f"https://images.example/{row}.jpg" for row in range(start, min(start + SHARD_ROWS, rows))]
        captions = [words[row % len(words)] for row in range(len(names))]
        header = ShardHeader({"model_id": "none"}, {}, {}, TOKENS, WIDTH, captions, names, names)
        with ShardWriter(folder / f"{start:09d}.h5", header) as writer:
            writer.write([RowRecord(row, Status.OK, features) for row in range(len(names))])
            writer.finish()


def measured(job: Callable[[Path], object], folder: Path) -> Figures:
    import train.data.samples  # noqa: F401  # what a run has imported

    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    job(folder)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.process_time() - before, (after - peak) / 1024


def opened(folder: Path) -> object:
    return open_shards(folder)


def usable(folder: Path) -> object:
    from train.data.sources import usable_rows

    return usable_rows(open_shards(folder), 1 << 60)


def identity(folder: Path) -> object:
    from train.data.sources import rows_identity, usable_rows

    shards = open_shards(folder)
    rows, _ = usable_rows(shards, 1 << 60)
    return rows_identity(shards, rows, [len(rows)])


if __name__ == "__main__":
    main()
