"""`extract verify`: are the features what they were, and are they what the encoder gives today?"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence

import numpy as np
import torch

from extract.again import images_again
from extract.config import VerifyConfig
from llava_core.console import progress, say, table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.fetch import FetchLimits
from llava_core.fingerprint import JsonDict, first_difference
from llava_core.shards import Shard, open_shards
from llava_core.status import Status
from llava_core.vision import VisionTower, open_vision_tower

TOLERANCE = 0.02
"""Largest relative distance of features encoded again: bf16 on another device stays below it."""


def run(config: VerifyConfig) -> JsonDict:
    """Raises LlavaError naming the damaged rows, or the row that the encoder now sees differently."""
    shards = open_shards(config.out)
    figures: JsonDict = {"shards": len(shards), "rows": sum(shard.rows for shard in shards)}
    figures["checked"] = _checksums(shards)
    if config.vision is not None:
        figures.update(_encode_again(config, shards))
    print(table([(key.replace("_", " "), value) for key, value in figures.items()]))
    return figures


def _ok_rows(shards: Sequence[Shard]) -> list[tuple[Shard, int]]:
    return [(shard, row) for shard in shards for row in np.flatnonzero(shard.status == Status.OK).tolist()]


def _checksums(shards: Sequence[Shard]) -> int:
    rows = _ok_rows(shards)
    with progress(len(rows), "rows", desc="checksums") as bar:
        damaged = []
        for shard, row in rows:
            shard.turns(row), shard.url(row)  # raise if they are no text any more
            if not shard.check(row):
                damaged.append(f"{shard.path}:{row}")
            bar.update()
    if damaged:
        raise LlavaError(
            f"{len(damaged)} of {len(rows):,} rows do not have their checksum",
            got=", ".join(damaged[:5]) + (" …" if len(damaged) > 5 else ""),
            do="delete those shards and run `extract run` again",
        )
    return len(rows)


def _encode_again(config: VerifyConfig, shards: Sequence[Shard]) -> JsonDict:
    assert config.vision is not None
    known = [shard for shard in shards if config.data is not None or not shard.local]
    if left := len(shards) - len(known):
        say(f"{left} shards of local images are not encoded again; give --data as to `extract run`")
    rows = _ok_rows(known)
    picked = sorted(random.Random(0).sample(range(len(rows)), min(config.sample, len(rows))))
    chosen = [rows[k] for k in picked]  # in order: images in a parquet file are read from first to last
    layer, decode = shards[0].encoder.get("layer"), shards[0].preprocess.get("decode", "draft")
    tower = open_vision_tower(config.vision, pick_device(config.device), layer=layer, decode=decode)
    if tower.fingerprint != shards[0].fingerprint:
        ours = {**tower.encoder, **tower.preprocess.to_json()}
        raise LlavaError(
            f"{config.vision} is not the encoder of these shards",
            got=first_difference({**shards[0].encoder, **shards[0].preprocess}, ours),
        )
    limits = FetchLimits(allow_private=config.allow_private)
    fetched = images_again(chosen, config.data, config.images, limits)
    distances = []
    for (shard, row), answer in zip(chosen, fetched, strict=True):
        # A picture that is gone or has changed since says nothing about the encoder.
        if hashlib.sha256(answer.body).digest() == shard.sha256[row].tobytes():
            distances.append((_distance(tower, answer.body, shard.read(row)), f"{shard.path}:{row}"))
    say(f"{len(distances)} of {len(chosen)} sampled images are still what they were")
    if distances and max(distances)[0] > TOLERANCE:
        worst, where = max(distances)
        raise LlavaError(
            f"{where}: the encoder gives other features",
            expected=f"a distance up to {TOLERANCE}",
            got=f"{worst:.4f}",
        )
    return {
        "encoded_again": len(distances),
        "largest_distance": f"{max(distances)[0]:.2e}" if distances else "-",
    }


def _distance(tower: VisionTower, image: bytes, stored: np.ndarray) -> float:
    """Relative: 0 for equal features."""
    pixels = tower.preprocess.decode_image(image, max_pixels=sys.maxsize).pixels  # its sha256 is known
    now, then = tower.encode(pixels[None])[0].cpu(), torch.from_numpy(stored).float()
    return float((now - then).norm() / then.norm())
