"""What large data costs: python -m benchmarks.scale [--only train find limit resume latency]

train     before the first step, over --rows captions in shards of 100,000
find      sources of a folder of --files files
limit     `extract run` reading the first 1,000 of --table-rows rows
resume    `extract run` beside --shards finished shards of 1,000 rows, with one of two rows to do
latency   `train run` of the demo's model whose every read waits 5 ms, each row once: its share of data wait

Features are a few numbers each, so that texts and columns dominate as they do not in practice. CPU and wall
seconds, and growth of the process's peak memory, of a process of its own for each line.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_core.cli.console import table
from llava_core.filesystem import read_json_lines, sha256_files
from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.types import JsonDict

SHARD_ROWS = 100_000
TOKENS, WIDTH = 1, 8
TAKEN = 1000
LATENCY = 0.005
Job = Callable[[], object]
"""What is measured; what it returns is printed if it is text."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--table-rows", type=int, default=2_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flags = parser.parse_args()
    lines = []
    for name in flags.only:
        with tempfile.TemporaryDirectory() as folder:
            for what, job in SECTIONS[name](Path(folder), flags):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    lines.append((what, *pool.apply(measured, (job,))))
    print(table(lines, ("", "CPU, s", "wall, s", "memory, MiB", "")))


def measured(job: Job) -> tuple[str, ...]:
    for imported in ("extract.run", "train.data.samples"):  # before a run begins
        importlib.import_module(imported)

    began, before = time.monotonic(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = job()
    cpu, wall = time.process_time() - before, time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"{cpu:.2f}",
        f"{wall:.2f}",
        f"{(after - peak) / 1024:.0f}",
        found if isinstance(found, str) else "",
    )


def before_training(folder: Path, flags: Any) -> Iterator[tuple[str, Job]]:
    for start in range(0, flags.rows, SHARD_ROWS):
        names = [address(row) for row in range(start, min(start + SHARD_ROWS, flags.rows))]
        header = ShardHeader({"model_id": "none"}, {}, {}, TOKENS, WIDTH, captions(len(names)), names, names)
        write_shard(folder / f"{start:09d}.h5", header)
    for job in (open_shards, usable, identity):
        yield f"{job.__name__} of {flags.rows:,} rows", functools.partial(job, folder)


def usable(folder: Path) -> object:
    from train.data.sources import usable_rows

    return usable_rows(open_shards(folder), 1 << 60)


def identity(folder: Path) -> object:
    from train.data.sources import rows_identity, usable_rows

    shards = open_shards(folder)
    rows, _ = usable_rows(shards, 1 << 60)
    return [rows_identity(shards, rows, [len(rows)])]


def finding(folder: Path, flags: Any) -> Iterator[tuple[str, Job]]:
    tables, pictures = folder / "tables", folder / "pictures"
    write_table(tables / "000000.parquet", 10)
    pictures.mkdir()
    for number in range(flags.files):
        (tables / f"{number:06d}.parquet").write_bytes((tables / "000000.parquet").read_bytes())
        (pictures / f"{number:06d}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        (pictures / f"{number:06d}.txt").write_text("a cat")
    yield f"{flags.files:,} parquet files", functools.partial(sources, tables, None)
    yield f"{flags.files:,} parquet files, --limit {TAKEN}", functools.partial(sources, tables, TAKEN)
    yield f"{flags.files:,} images with words beside them", functools.partial(sources, pictures, None)


def sources(data: Path, limit: int | None) -> str:
    from extract.sources.find import find_sources

    return f"{len(find_sources(str(data), limit=limit)):,} sources"


def limited(folder: Path, flags: Any) -> Iterator[tuple[str, Job]]:
    for suffix in ("parquet", "jsonl", "json", "csv"):
        path = folder / f"x.{suffix}"
        write_table(path, flags.table_rows)
        what = f"{TAKEN:,} of {flags.table_rows:,} rows, {suffix} of {path.stat().st_size / 1e6:.0f} MB"
        yield what, functools.partial(first_columns, path)
        yield "  of this, its sha256", functools.partial(hashed, path)


def first_columns(path: Path) -> str:
    """What `extract run --limit` reads of a table."""
    from extract.sources.find import find_sources

    (source,) = find_sources(str(path), limit=TAKEN)
    source.identity()
    return f"{len(source.read().captions):,} rows"


def hashed(path: Path) -> None:
    sha256_files([path])


def resuming(folder: Path, flags: Any) -> Iterator[tuple[str, Job]]:
    from extract.sources.find import find_sources
    from llava_core.vision.open import open_vision_tower

    tower = open_vision_tower(MODELS / "vision")
    for number in range(flags.shards):
        write_table(folder / f"data/{number:06d}.parquet", 1000, first=1000 * number)
    (folder / "out").mkdir()
    for source in find_sources(str(folder / "data")):
        columns, encoder = source.read(), (tower.encoder, tower.preprocess.to_json(), source.identity())
        texts = ([text or "" for text in columns.captions], columns.image_refs, columns.ids)
        write_shard(folder / f"out/{source.stem}.h5", ShardHeader(*encoder, TOKENS, WIDTH, *texts))
    write_table(folder / "data/last.parquet", 2, first=1 << 30)
    yield f"resumed beside {flags.shards:,} shards", functools.partial(resume, folder)


def resume(folder: Path) -> str:
    from extract.config import RunConfig
    from extract.run import run

    config = RunConfig(
        data=str(folder / "data"),
        out=folder / "out",
        vision=MODELS / "vision",
        device="cpu",
        allow_private=True,
        retries=0,
        max_failed=1.0,
    )
    return f"{run(config)['rows']:,} rows"


def waiting(folder: Path, flags: Any) -> Iterator[tuple[str, Job]]:
    from llava_core.vision.open import open_vision_tower

    tower, rows = open_vision_tower(MODELS / "vision"), 16 * 60
    names = [address(row) for row in range(rows)]
    shape = (tower.tokens, tower.width)
    header = ShardHeader(tower.encoder, tower.preprocess.to_json(), {}, *shape, captions(rows), names, names)
    write_shard(folder / "features/a.h5", header)
    for name, latency in (("as this disk reads", 0.0), ("5 ms a read", LATENCY)):
        yield f"60 steps of 16, {name}", functools.partial(train_slowly, folder, latency)


def train_slowly(folder: Path, latency: float) -> str:
    """Data wait of a run that reads each row once, from the steps after the first ten."""
    from train.config import RunConfig
    from train.run import run

    for name in ("pread", "preadv"):
        setattr(os, name, late(getattr(os, name), latency))
    config = RunConfig(
        features=folder / "features",
        llm=MODELS / "llm",
        out=folder / f"run-{latency}",
        batch_size=16,
        log_every=10,
        device="cpu",
    )
    run(config)
    lines = [line for line in read_json_lines(config.out / "metrics.jsonl") if "data_wait" in line]
    return "data_wait " + ", ".join(f"{line['data_wait']:.1%}" for line in lines)


def late(read: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slowly(*arguments: Any) -> Any:
        time.sleep(seconds)
        return read(*arguments)

    return slowly if seconds else read


def address(row: int) -> str:
    return f"http://127.0.0.1:9/{row}.jpg"


def captions(rows: int) -> list[str]:
    rng = random.Random(0)
    words = [caption(random_scene(rng), rng) for _ in range(TAKEN)]
    return [words[row % TAKEN] for row in range(rows)]


def write_shard(path: Path, header: ShardHeader) -> None:
    """A finished shard whose rows are all ok, with features of one row's noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = np.random.default_rng(0).standard_normal((header.tokens, header.width)).astype("<f2")
    digests = np.random.default_rng([*path.name.encode()]).bytes(32 * header.rows)
    with ShardWriter(path, header) as writer:
        records = [
            RowRecord(row, Status.OK, features, sha256=digests[32 * row : 32 * row + 32])
            for row in range(header.rows)
        ]
        writer.write(records)
        writer.finish()


def write_table(path: Path, rows: int, first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"url": [address(row) for row in range(first, first + rows)], "caption": captions(rows)}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=SHARD_ROWS)
        return
    pairs = zip(*columns.values(), strict=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([columns.keys(), *pairs])
            return
        objects: Iterator[JsonDict] = (dict(zip(columns, pair, strict=True)) for pair in pairs)
        lines = (json.dumps(each, ensure_ascii=False) for each in objects)
        file.write("\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]")


SECTIONS: dict[str, Callable[[Path, Any], Iterator[tuple[str, Job]]]] = {
    "train": before_training,
    "find": finding,
    "limit": limited,
    "resume": resuming,
    "latency": waiting,
}


if __name__ == "__main__":
    main()
