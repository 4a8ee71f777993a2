"""`extract` from parquet over a real server to shards, killed, interrupted and fed badly."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

from extract.config import RunConfig
from extract.pipeline import Filling, Pipeline
from llava_core.console import progress
from llava_core.shard_writer import ShardWriter
from llava_core.shards import Shard, ShardHeader, open_shards
from llava_core.status import Status
from llava_core.vision import open_vision_tower
from tests.e2e.commands import run, start
from tests.servers import answer, serving
from tests.small_vision import write_vision_folder

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


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    routes = {
        "/{name}.jpg": image,
        "/gone": answer(status=404),
        "/page": answer(b"<html>"),
        "/cut": answer(picture(0)[:700]),
        "/slow": slow,
    }
    with serving({**routes, "/{name:\\d+.jpg}": image}) as url:
        yield url


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("vision"))


def write_parquet(path: Path, urls: list[str], captions: list[Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = captions or [{"global_caption": f"第{i}张图", "local": ["x"]} for i in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "cap_seg": captions}), path)


def good(base: str, rows: int, start: int = 0) -> list[str]:
    return [f"{base}/{i}.jpg" for i in range(start, start + rows)]


def features_are_right(shard: Shard, vision: Path) -> None:
    """Each row holds what the tower gives for the picture its address leads to."""
    tower = open_vision_tower(vision)
    for row in np.flatnonzero(shard.status == Status.OK).tolist():
        data = picture(int(shard.url(row).rsplit("/", 1)[1].split(".")[0]))
        expected = tower.encode(tower.preprocess.decode_image(data).pixels[None])[0]
        assert shard.check(row)
        np.testing.assert_allclose(shard.read(row), expected.numpy(), rtol=2e-3, atol=2e-3)


def test_every_row_gets_an_outcome(base: str, vision: Path, tmp_path: Path) -> None:
    urls = [*good(base, 40), f"{base}/gone", f"{base}/page", f"{base}/cut", f"{base}/slow", "nonsense"]
    write_parquet(tmp_path / "data/b.parquet", urls)
    write_parquet(tmp_path / "data/a.parquet", good(base, 30, start=100))
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--vision", vision, "--allow-private",
             "--timeout", 1, "--retries", 0, "--json")  # fmt: skip
    plan = run("extract", "run", *flags, "--dry-run").summary
    assert plan["rows"] == 75
    assert not (tmp_path / "out").exists()

    ended = run("extract", "run", *flags, code=3)
    assert ended.summary["ok"] == 70
    expected = {"ok": 70, "http 4xx": 1, "not an image": 1, "truncated": 1, "timeout": 1, "bad url": 1}
    assert ended.summary["by_status"] == expected
    assert "over --max-failed" in ended.err
    assert "rows/s" not in ended.err  # no bar where there is no terminal
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.h5", "a.json", "b.h5", "b.json"]
    assert json.loads((tmp_path / "out/b.json").read_text())["failed"] == 5

    for shard in open_shards(tmp_path / "out"):
        features_are_right(shard, vision)
        assert [shard.caption(i) for i in range(3)] == ["第0张图", "第1张图", "第2张图"]
    shard = Shard(tmp_path / "out/b.h5")
    assert shard.status[40:].tolist() == [10, 20, 22, 7, 2]
    assert shard.http[40] == 404
    assert tuple(shard.orig_hw[0]) == (60, 80)

    before, requests = (tmp_path / "out/b.h5").read_bytes(), asked.total()
    again = run("extract", "run", *flags, "--max-failed", 0.5)
    assert "nothing to do" in again.err
    assert (asked.total(), (tmp_path / "out/b.h5").read_bytes()) == (requests, before)

    verified = run(
        "extract", "verify", "--out", tmp_path / "out", "--vision", vision, "--allow-private", "--json"
    )
    assert (verified.summary["checked"], verified.summary["encoded_again"]) == (70, 16)
    inspected = run("extract", "inspect", "--out", tmp_path / "out", "--json")
    assert inspected.summary["failed"] == 5


def test_rows_killed_at_any_moment_end_up_exactly_once(base: str, vision: Path, tmp_path: Path) -> None:
    for part in range(3):
        write_parquet(tmp_path / f"data/{part}.parquet", good(base, 60, start=60 * part))
    flags = ("--data", tmp_path / "data", "--vision", vision, "--allow-private", "--batch-size", 8,
             "--concurrency", 8)  # fmt: skip
    rng, kills = random.Random(0), 0
    command = ("extract", "run", *flags, "--out", tmp_path / "killed")
    while kills < 8:
        process = start(*command)
        while not (tmp_path / "killed").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.9))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills >= 2
    run(*command)
    run("extract", "run", *flags, "--out", tmp_path / "undisturbed")
    assert sorted(p.name for p in (tmp_path / "killed").glob("*.h5*")) == ["0.h5", "1.h5", "2.h5"]
    for part in range(3):
        killed, whole = Shard(tmp_path / f"killed/{part}.h5"), Shard(tmp_path / f"undisturbed/{part}.h5")
        assert killed.status.tolist() == [Status.OK] * 60
        assert all(killed.check(row) for row in range(60))
        assert [killed.url(row) for row in range(60)] == [whole.url(row) for row in range(60)]
        for row in range(60):  # the batch a row was encoded in may differ, and with it the last bit
            np.testing.assert_allclose(killed.read(row), whole.read(row), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_encoded(base: str, vision: Path, tmp_path: Path, signum: int) -> None:
    write_parquet(tmp_path / "data/a.parquet", [*good(base, 30), f"{base}/slow"])
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private",
             "--batch-size", 4, "--retries", 0, "--timeout", 4)  # fmt: skip
    before = asked.total()
    process = start("extract", "run", *flags)
    while asked.total() - before < 30:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.7)
    process.send_signal(signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert (tmp_path / "out/a.h5.part").exists()
    run("extract", "run", *flags)
    assert asked.total() - before == 30  # nothing was downloaded twice
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [1] * 30 + [7]


def test_retry_failed_takes_the_chosen_classes_only(vision: Path, tmp_path: Path) -> None:
    healed = False

    async def moody(request: web.Request) -> web.Response:
        return web.Response(body=picture(1)) if healed else web.Response(status=503)

    with serving({"/moody.jpg": moody, "/gone": answer(status=404)}) as base:
        write_parquet(tmp_path / "data/a.parquet", [f"{base}/moody.jpg", f"{base}/gone"])
        flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--retries", 0, "--json")
        ended = run("extract", "run", "--data", tmp_path / "data", *flags, code=3)
        assert ended.summary["by_status"] == {"http 5xx": 1, "http 4xx": 1}
        healed = True
        ended = run("extract", "retry-failed", "--status", "http-5xx", *flags, code=3)
        assert ended.summary["by_status"] == {"ok": 1, "http 4xx": 1}
        assert (
            "unknown status" in run("extract", "retry-failed", "--status", "sunny", *flags, code=2).one_line()
        )


def test_cap_seg_in_all_its_forms(base: str, vision: Path, tmp_path: Path) -> None:
    texts = [
        json.dumps({"global_caption": "一个JSON"}),
        repr({"global_caption": "一个'字典'", "x": None}),
        "{'global_caption': ",
        json.dumps({"other": 1}),
        "no dict",
        None,
        json.dumps({"global_caption": "  "}),
    ]
    write_parquet(tmp_path / "data/a.parquet", good(base, len(texts)), texts)
    before = asked.total()
    flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--json")
    ended = run("extract", "run", "--data", tmp_path / "data", *flags, code=3)
    assert ended.summary["by_status"] == {"bad caption": 5, "ok": 2}
    assert asked.total() - before == 2
    shard = Shard(tmp_path / "out/a.h5")
    assert [shard.caption(row) for row in range(3)] == ["一个JSON", "一个'字典'", ""]


def test_limit_counts_rows_of_all_files(base: str, vision: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_parquet(tmp_path / f"data/{name}.parquet", good(base, 4))
    flags = (
        "--data",
        f"{tmp_path}/data/*.parquet",
        "--vision",
        vision,
        "--out",
        tmp_path / "out",
        "--allow-private",
    )
    run("extract", "run", *flags, "--limit", 6)
    assert [Shard(tmp_path / f"out/{name}.h5").rows for name in "ab"] == [4, 2]
    assert "other rows of it" in run("extract", "run", *flags, code=1).one_line()


def test_bad_input_is_one_clear_line(base: str, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--vision", vision, "--out", out)
    missing = run("extract", "run", "--data", tmp_path / "nowhere", *flags, code=1).one_line()
    assert f"no data at {tmp_path}/nowhere" in missing
    (tmp_path / "empty").mkdir()
    assert (
        "nothing to extract in"
        in run("extract", "run", "--data", tmp_path / "empty", *flags, code=1).one_line()
    )

    pq.write_table(pa.table({"link": ["x"], "cap_seg": ["y"]}), tmp_path / "no-url.parquet")
    line = run("extract", "run", "--data", tmp_path / "no-url.parquet", *flags, code=1).one_line()
    assert "lacks the image" in line
    assert "got link, cap_seg" in line
    (tmp_path / "text.parquet").write_text("url,caption")
    assert (
        "not a readable parquet"
        in run("extract", "run", "--data", tmp_path / "text.parquet", *flags, code=1).one_line()
    )

    write_parquet(tmp_path / "data/a.parquet", good(base, 2))
    bare = write_vision_folder(tmp_path / "bare")
    (bare / "vocab.txt").unlink()
    lacking = run(
        "extract", "run", "--data", tmp_path / "data", "--vision", bare, "--out", out, code=1
    ).one_line()
    assert "lacks vocab.txt" in lacking
    assert not out.exists()

    run("extract", "run", "--data", tmp_path / "data", *flags, "--allow-private")
    other = write_vision_folder(tmp_path / "other", seed=3)
    command = ("extract", "run", "--data", tmp_path / "data", "--out", out)
    assert (
        "features of another encoder; got weights_sha256"
        in run(*command, "--vision", other, code=1).one_line()
    )
    with h5py.File(out / "a.h5"):  # nothing was lost
        pass
    private = run(*command[:4], "--vision", vision, "--out", tmp_path / "closed", "--json", code=3)
    assert private.summary["by_status"] == {"forbidden address": 2}


def test_two_processes_never_fill_one_shard(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", [*good(base, 4), f"{base}/slow"])
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private",
             "--timeout", 30, "--retries", 0)  # fmt: skip
    first = start("extract", "run", *flags)
    while not (tmp_path / "out/a.h5.lock").exists():
        time.sleep(0.02)
    assert f"by process {first.pid} on" in run("extract", "run", *flags, code=1).one_line()
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=30)
    assert first.returncode == 130


def test_usage_errors(vision: Path, tmp_path: Path) -> None:
    flags = ("--data", tmp_path, "--vision", vision, "--out", tmp_path / "out")
    assert "above 0" in run("extract", "run", *flags, "--limit", 0, code=2).one_line()
    (tmp_path / "run.yaml").write_text("concurency: 3\n")
    line = run("extract", "run", "-c", tmp_path / "run.yaml", *flags, code=2).one_line()
    assert "did you mean 'concurrency'?" in line
    run("extract", "run", *flags, "--no-such-flag", code=2)


def test_columns_of_bytes_and_damaged_text(base: str, vision: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    bad = pa.array([b"\xff\xfe caption", "好".encode(), b"[" * 9000]).view(pa.string())
    urls = pa.array([url.encode() for url in good(base, 3)], pa.binary())
    pq.write_table(pa.table({"url": urls, "caption": bad}), tmp_path / "data/a.parquet")
    nested = pa.array(["[" * 100_000, json.dumps({"global_caption": "好"}).encode().decode()])
    pq.write_table(pa.table({"url": good(base, 2), "cap_seg": nested}), tmp_path / "data/b.parquet")
    flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--json")
    ended = run("extract", "run", "--data", tmp_path / "data", *flags, code=3)
    assert ended.summary["by_status"] == {"ok": 4, "bad caption": 1}
    assert Shard(tmp_path / "out/a.h5").caption(1) == "好"
    twice = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["url", "url", "caption"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    line = run("extract", "run", "--data", tmp_path / "twice.parquet", *flags[:4], code=1).one_line()
    assert "more than one column 'url'" in line


def test_a_damaged_file_costs_its_own_rows_only(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 20))
    write_parquet(tmp_path / "data/b.parquet", good(base, 500))
    data = bytearray((tmp_path / "data/b.parquet").read_bytes())
    data[4:400] = bytes(396)  # its pages, not its footer
    (tmp_path / "data/b.parquet").write_bytes(data)
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private")
    assert "damaged parquet file" in run("extract", "run", *flags, code=1).one_line()
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [Status.OK] * 20


@pytest.mark.parametrize("attempt", range(4))
def test_a_stage_that_fails_ends_the_others(base: str, vision: Path, tmp_path: Path, attempt: int) -> None:
    """As when a GPU runs out of memory: the error comes out, and soon."""
    tower = open_vision_tower(vision)

    def encode(pixels: np.ndarray) -> None:
        raise RuntimeError("out of memory")

    broken = dataclasses.replace(tower)
    object.__setattr__(broken, "encode", encode)
    config = RunConfig(
        data="", out=tmp_path, vision=vision, allow_private=True, batch_size=4 + attempt, concurrency=8
    )
    urls = good(base, 60)
    header = ShardHeader(
        tower.encoder, tower.preprocess.to_json(), {}, tower.tokens, tower.width, ["x"] * 60, urls, urls
    )
    pipeline = Pipeline(broken, config, progress(60, "rows"), lambda filling: None)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipeline.run([lambda: Filling(ShardWriter(tmp_path / "x.h5", header), urls, ["x"] * 60)])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_it_and_loses_nothing(
    base: str, vision: Path, small_disk: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 600))
    out = small_disk / "out"
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", out, "--allow-private",
             "--concurrency", 4)  # fmt: skip
    process = start("extract", "run", *flags)
    while not (out / "a.h5.journal").exists():
        assert process.poll() is None
        time.sleep(0.01)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith("error: No space left on device")
    assert "Traceback" not in err
    (small_disk / "filler").unlink()
    before = asked.total()
    run("extract", "run", *flags)
    assert Shard(out / "a.h5").status.tolist() == [Status.OK] * 600
    assert asked.total() - before <= 600
    (small_disk / "filler").write_bytes(bytes(300_000))
    line = run("extract", "run", *flags[:4], "--out", small_disk / "again", code=1).one_line()
    assert "not enough disk space" in line
    assert not list((small_disk / "again").glob("*.tmp"))
