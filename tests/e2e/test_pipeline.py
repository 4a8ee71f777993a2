"""The stages of `extract`, run in this process against real servers."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from extract.config import RunConfig
from extract.open_shard import OpenShard
from extract.pipeline import run_pipeline
from extract.run import run as extract
from llava_core.cli.console import progress
from llava_core.network.async_tasks import run_async
from llava_core.row_status import Status
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower
from tests.support.pictures import good, picture, write_parquet
from tests.support.servers import serving


@pytest.fixture(scope="module")
def tower(vision: Path) -> VisionTower:
    return open_vision_tower(vision)


def open_shard(tower: VisionTower, path: Path, urls: list[str]) -> OpenShard:
    captions = ["一张图"] * len(urls)
    header = ShardHeader(
        tower.encoder, tower.preprocess.to_json(), {}, tower.tokens, tower.width, captions, urls, urls
    )
    return OpenShard(ShardWriter(path, header), urls, captions)


def test_a_slow_host_keeps_only_its_own_rows_waiting(tower: VisionTower, tmp_path: Path) -> None:
    """It answers only after every row of the other has been asked for, whichever shard that is in."""
    fast: set[str] = set()

    async def quick(request: web.Request) -> web.Response:
        fast.add(request.path)
        return web.Response(body=picture(int(request.match_info["n"])))

    async def slow(request: web.Request) -> web.Response:
        while len(fast) < 120:
            await asyncio.sleep(0.02)
        return web.Response(body=picture(500 + int(request.match_info["n"])))

    config = RunConfig(
        data="", out=tmp_path, vision=tmp_path, allow_private=True, concurrency=8, per_host=4, retries=0
    )
    with serving({"/{n}": quick}) as one, serving({"/{n}": slow}, host="127.0.0.2") as other:
        shards = []
        for part in range(3):
            urls = [f"{other}/{20 * part + i}" for i in range(20)]
            urls += [f"{one}/{40 * part + i}" for i in range(40)]
            path = tmp_path / f"{part}.h5"
            shards.append([lambda path=path, urls=urls: open_shard(tower, path, urls)])
        run_async(run_pipeline([tower], config, shards, progress(None, "rows"), lambda shard, seconds: None))
    for part in range(3):
        assert Shard(tmp_path / f"{part}.h5").status.tolist() == [Status.OK] * 60


def test_the_stage_that_is_busy_is_named(tower: VisionTower, tmp_path: Path) -> None:
    async def quick(request: web.Request) -> web.Response:
        return web.Response(body=picture(int(request.match_info["n"])))

    with serving({"/{n}": quick}) as base:
        urls = [f"{base}/{i}" for i in range(20)]
        config = RunConfig(data="", out=tmp_path, vision=tmp_path, allow_private=True, host_rate=10)
        opener = functools.partial(open_shard, tower, tmp_path / "a.h5", urls)
        bar = progress(None, "rows")
        figures = run_async(run_pipeline([tower], config, [[opener]], bar, lambda shard, seconds: None))
    assert figures["bottleneck"] == "download"
    assert set(figures["stages"]) == {"decode", "encode", "write"}
    assert 0 < figures["stages"]["encode"]["busy"] < 0.7


@pytest.mark.parametrize("attempt", range(4))
def test_a_stage_that_fails_ends_the_others(
    base: str, tower: VisionTower, tmp_path: Path, attempt: int
) -> None:
    """As when a GPU runs out of memory: the error comes out, and soon."""

    def encode(pixels: np.ndarray) -> None:
        raise RuntimeError("out of memory")

    broken = dataclasses.replace(tower)
    object.__setattr__(broken, "encode", encode)
    config = RunConfig(
        data="", out=tmp_path, vision=tmp_path, allow_private=True, batch_size=4 + attempt, concurrency=8
    )
    opener = functools.partial(open_shard, tower, tmp_path / "x.h5", good(base, 60))
    with pytest.raises(RuntimeError, match="out of memory"):
        run_async(
            run_pipeline([broken], config, [[opener]], progress(60, "rows"), lambda shard, seconds: None)
        )


def test_called_again_in_one_process_and_in_any_thread(base: str, vision: Path, tmp_path: Path) -> None:
    """A folder that was deleted and made anew, here with another layer, is not mistaken for the old one."""
    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, features = [signal.getsignal(signum) for signum in stop_signals], []
    for layer in (None, -2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for names in ("a", "ab"):  # the rows of b are copied from a
            write_parquet(tmp_path / f"data/{names[-1]}.parquet", good(base, 8))
            config = RunConfig(
                data=str(tmp_path / f"data/[{names}].parquet"),
                out=tmp_path / "out",
                vision=vision,
                layer=layer,
                device="cpu",
                allow_private=True,
            )
            with ThreadPoolExecutor(1) as thread:
                assert thread.submit(extract, config).result()["failed"] == 0
            assert handlers == [signal.getsignal(signum) for signum in stop_signals]
        a, b = Shard(tmp_path / "out/a.h5"), Shard(tmp_path / "out/b.h5")
        assert [b.read(row).tobytes() for row in range(8)] == [a.read(row).tobytes() for row in range(8)]
        features.append(a.read(0).tobytes())
    assert features[0] != features[1]
