"""Small pictures on a real server, parquet files of their addresses, and what must come of them."""

from __future__ import annotations

import asyncio
import collections
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image

from llava_core.shards.reader import Shard
from llava_core.vision.open import open_vision_tower

asked: collections.Counter[str] = collections.Counter()


def picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60))
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


async def image(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    asked[name] += 1
    await asyncio.sleep(0.01)
    return web.Response(body=picture(int(name.split(".")[0])))


async def slow(request: web.Request) -> web.Response:
    await asyncio.sleep(20)
    return web.Response()


def write_parquet(path: Path, urls: list[str], captions: list[Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = captions or [{"global_caption": f"第{i}张图", "local": ["x"]} for i in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "cap_seg": captions}), path)


def good(base: str, rows: int, start: int = 0) -> list[str]:
    return [f"{base}/{i}.jpg" for i in range(start, start + rows)]


def features_are_right(shard: Shard, vision: Path) -> None:
    """Each row holds what the tower gives for the picture its address leads to."""
    tower = open_vision_tower(vision)
    for row in shard.ok_rows():
        data = picture(int(shard.url(row).rsplit("/", 1)[1].split(".")[0]))
        expected = tower.encode(tower.preprocess.decode_image(data).pixels[None])[0]
        assert shard.check(row)
        np.testing.assert_allclose(shard.read(row), expected.numpy(), rtol=2e-3, atol=2e-3)
