"""How many sabotaged rows `extract curate` finds, and what it is worth: python -m benchmarks.curate --out DIR

The built-in world's pictures are encoded, and a share of the rows sabotaged in one way or in all of them: the
captions of others, or their own with the characters shuffled, features of zeros, pictures that are there
already and were saved again, captions too short, captions in English. `--steps` also trains on all rows, on
those that are kept, and on those that were not sabotaged, with as many steps each. `--rows 100000 --copies 8`
measures the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import tyro
from PIL import Image

from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.render import jpeg, render
from llava_align.demo.world.scene import random_scene
from llava_align.subprocess_command import run_command
from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.row_list import write_row_list
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower

KINDS = (
    *("another caption", "characters shuffled", "zero features", "picture again", "short caption"),
    "English caption",
)
SHORT = ("图", "", "红色", "a")
ENGLISH = ("a red circle in the corner", "two blue squares on white", "a large green diamond below")
ENCODED = 128
"""Pictures in a batch."""


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder to write; a cache that is there is used again."""
    rows: int = 6000
    copies: int = 1
    """Times that each picture is taken, with noise on its features: to measure the time of many rows."""
    share: float = 0.3
    kind: Literal["all", "another caption"] = "all"
    score: Literal["auto", "text-tower", "fit"] = "auto"
    steps: int = 0
    """Steps of training; 0 trains none."""
    seeds: int = 3
    held_out: int = 512
    seed: int = 0


@dataclasses.dataclass
class Cache:
    """Rows to be written: features, captions, image files, and what was done to each."""

    features: np.ndarray
    captions: list[str]
    images: list[bytes]
    sabotage: np.ndarray


def main() -> None:
    given = tyro.cli(Settings, description=__doc__)
    train, truth = given.out / "train", given.out / "sabotage.npy"
    if not truth.exists():
        cache = drawn(given.rows // given.copies, given.seed, given.copies)
        sabotage(cache, given)
        write(train / "a.h5", cache)
        if given.held_out:
            write(given.out / "held-out/b.h5", drawn(given.held_out, given.seed + 1))
        np.save(truth, cache.sabotage.astype(str))
    listed, began = given.out / f"{given.score}.parquet", time.monotonic()
    run_command(
        *(
            "extract",
            "curate",
            "--features",
            train,
            "--out",
            listed,
            "--html",
            given.out / f"{given.score}.html",
        ),
        *("--score", given.score, *(("--vision", MODELS / "vision") if given.score != "fit" else ())),
    )
    print(f"{time.monotonic() - began:.1f} s")
    report(listed, np.load(truth))
    if given.steps:
        compare(given, listed, np.load(truth))


def drawn(rows: int, seed: int, copies: int = 1) -> Cache:
    """Scenes of the world, encoded."""
    rng, tower = random.Random(f"curate/{seed}"), open_vision_tower(MODELS / "vision")
    scenes = [random_scene(rng) for _ in range(rows)]
    images = [jpeg(render(scene, rng)) for scene in scenes]
    captions = [caption(scene, rng) for _ in range(copies) for scene in scenes]
    features = np.concatenate([encode(tower, images[k : k + ENCODED]) for k in range(0, rows, ENCODED)])
    noise = np.random.default_rng(seed)
    parts = [features] + [
        (features + noise.normal(0, 0.3, features.shape)).astype("<f2") for _ in range(copies - 1)
    ]
    return Cache(np.concatenate(parts), captions, images * copies, np.full(rows * copies, "", object))


def encode(tower: VisionTower, images: Sequence[bytes]) -> np.ndarray:
    pixels = np.stack([tower.preprocess.decode_image(image).pixels for image in images])
    return np.asarray(tower.encode(pixels).numpy().astype("<f2"))


def sabotage(cache: Cache, given: Settings) -> None:
    """Spoil a share of the rows, of each kind as many."""
    rng, tower = np.random.default_rng(given.seed), open_vision_tower(MODELS / "vision")
    n = len(cache.captions)
    order = rng.permutation(n)
    bad, good = np.split(order, [round(given.share * n)])
    kinds = KINDS if given.kind == "all" else KINDS[:1]
    for kind, rows in zip(kinds, np.array_split(bad, len(kinds)), strict=True):
        cache.sabotage[rows] = kind
        before = [cache.captions[row] for row in rows]
        for k, row in enumerate(rows.tolist()):
            if kind == "another caption":
                cache.captions[row] = before[k - 1]
            elif kind == "characters shuffled":
                cache.captions[row] = "".join(rng.permutation(list(before[k])))
            elif kind == "zero features":
                cache.features[row] = 0
            elif kind == "picture again":
                first = int(good[k])
                again = io.BytesIO()
                Image.open(io.BytesIO(cache.images[first])).save(again, "JPEG", quality=75)
                cache.images[row], cache.captions[row] = again.getvalue(), cache.captions[first]
                cache.features[row] = encode(tower, [again.getvalue()])[0]
            else:
                cache.captions[row] = (SHORT if kind == "short caption" else ENGLISH)[k % 3]


def write(path: Path, cache: Cache) -> None:
    tower = open_vision_tower(MODELS / "vision")
    n = len(cache.captions)
    header = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source={"name": f"{path.stem}.parquet", "rows": n, "sha256": "0" * 64},
        tokens=tower.tokens,
        width=tower.width,
        captions=cache.captions,
        urls=[""] * n,
        ids=[str(row) for row in range(n)],
        thumbnails=n <= 20_000,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path, header) as writer:
        for start in range(0, n, ENCODED):
            writer.write([record(tower, cache, row) for row in range(start, min(start + ENCODED, n))])
        writer.finish()


def record(tower: VisionTower, cache: Cache, row: int) -> RowRecord:
    image = cache.images[row]
    small = None
    if len(cache.captions) <= 20_000:
        small = tower.preprocess.thumbnail(tower.preprocess.decode_image(image), 4000)
    digest = hashlib.sha256(image).digest()
    return RowRecord(
        row,
        Status.OK,
        cache.features[row],
        nbytes=len(image),
        orig_hw=(192, 192),
        sha256=digest,
        thumbnail=small,
    )


def report(listed: Path, truth: np.ndarray) -> None:
    """Shares of the sabotaged rows that are dropped, and of the others.

    Of a picture that is there twice, one row is to be dropped, whichever comes first in the cache.
    """
    table = pq.read_table(listed)
    reasons = np.array(table["reason"].to_pylist(), object)
    of = [int(place.split()[1]) if place else -1 for place in table["duplicate_of"].to_pylist()]
    dropped = reasons != ""
    first = {k for k in of if k >= 0 and truth[k] == "picture again"}
    for k in first:  # its original was dropped in its place
        dropped[k] = True
    spared = np.array([of[k] in first for k in range(len(of))])
    for kind in (*KINDS, ""):
        own = truth == kind
        if own.any():
            share = (dropped & ~spared)[own].mean()
            print(f"{kind or 'not sabotaged':16} {own.sum():6,} rows, dropped {share:.2%}")
    print(f"{'all sabotaged':16} {(truth != '').sum():6,} rows, dropped {dropped[truth != ''].mean():.2%}")


def compare(given: Settings, listed: Path, truth: np.ndarray) -> None:
    shards = open_shards(given.out / "train")
    places = np.stack([np.zeros(len(truth), np.int64), np.arange(len(truth))], 1)
    clean = given.out / "clean.parquet"
    write_row_list(clean, shards, places, {"reason": truth.tolist()})
    run_command(
        *("train", "sweep", "--features", given.out / "train", "--eval-features", given.out / "held-out"),
        *("--llm", MODELS / "llm", "--out", given.out / f"sweep-{given.score}", "--max-steps", given.steps),
        *("--epochs", 100, "--eval-every", given.steps, "--save-every", given.steps, "--eval-captions", 0),
        *("--space", f"rows=all,{listed},{clean}", f"seed={','.join(map(str, range(given.seeds)))}"),
    )


if __name__ == "__main__":
    main()
