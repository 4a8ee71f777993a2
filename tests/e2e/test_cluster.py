"""Several workers: files of `extract run` shared, or on a Ray cluster that loses a node; a sweep's trials."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.journal import HEADER_BYTES, RECORD
from llava_core.shards.reader import Shard
from tests.support.commands import holder, run, started, wait_until
from tests.support.pictures import features_are_right, good, picture, write_parquet
from tests.support.ray_cluster import ACCESS, Node, ray_cluster
from tests.support.runs import config, flags_of, write_runs
from tests.support.servers import answer, serving

asked: collections.Counter[str] = collections.Counter()


async def image(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    asked[name] += 1
    await asyncio.sleep(0.05)
    return web.Response(body=picture(int(name.split(".")[0])))


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving({"/{name:\\d+.jpg}": image, "/gone": answer(status=404)}) as url:
        yield url


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Node, Node]]:
    with ray_cluster() as started:
        yield started
    assert not started[1].processes() | started[2].processes()


def half_done(out: Path, by: Node) -> bool:
    """Whether a shard that this node writes has rows on disk and lacks others."""
    for lock in out.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError):
            journal = lock.with_suffix(".journal").stat().st_size
            if journal >= HEADER_BYTES + 100 * RECORD.itemsize and holder(lock) in by.processes():
                return True
    return False


def test_a_node_dies_and_every_row_is_there_once(
    cluster: tuple[str, Node, Node], base: str, vision: Path, tmp_path: Path
) -> None:
    address, _, other = cluster
    for part in range(4):
        urls = [*good(base, 300, 300 * part), f"{base}/gone"]
        write_parquet(tmp_path / f"data/{part}.parquet", urls)
    asked.clear()
    flags = ("--data", "data", "--out", "out", "--vision", vision, "--allow-private", "--ray", address,
             "--concurrency", 8, "--batch-size", 8, "--json")  # fmt: skip
    with started("extract", "run", *flags, cwd=tmp_path, **ACCESS) as process:
        wait_until(process, lambda: half_done(tmp_path / "out", other))
        other.kill()
        out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "2 workers of 1 CPU core" in err
    assert err.count("frozen: ") == 1
    assert err.count("its worker died; another continues it") == 1
    ours = ("Ray at", "frozen: ", "no worker is running", "most failures")
    of_a_file = (": its worker died; another continues it", ".h5: 301 rows, 1 failed")
    lines = err.splitlines()
    assert [line for line in lines if not (line.startswith(ours) or line.endswith(of_a_file))] == []
    assert out.startswith("outcome")  # and not Ray's remarks
    summary = json.loads(out.splitlines()[-1])
    assert summary["by_status"] == {"ok": 1200, "http 4xx": 4}
    assert summary["failed_hosts"] == {"127.0.0.1": 4}
    shards = open_shards(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{n}.{s}" for n in range(4) for s in ("h5", "json")
    ]
    for part, shard in enumerate(shards):
        assert [shard.url(row) for row in range(300)] == good(base, 300, 300 * part)
        assert shard.status.tolist() == [Status.OK] * 300 + [Status.HTTP_4XX]
        features_are_right(shard, vision)
    # The rows of the journal, 128 or more, were not asked for again.
    assert 1200 <= asked.total() <= 1200 + 172


def test_an_interrupt_ends_the_workers_and_one_bad_file_stops_no_other(
    cluster: tuple[str, Node, Node], base: str, vision: Path, tmp_path: Path
) -> None:
    address, head, _ = cluster
    write_parquet(tmp_path / "data/a.parquet", good(base, 400))
    command = (
        "extract", "run", "--data", tmp_path / "data", "--out", tmp_path / "out", "--vision", vision,
        "--allow-private", "--ray", address, "--concurrency", 8,
    )  # fmt: skip
    with started(*command, **ACCESS) as process:
        wait_until(process, lambda: half_done(tmp_path / "out", head))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; the same command continues where it stopped"
    assert "Traceback" not in err

    write_parquet(tmp_path / "data/b.parquet", good(base, 500))
    data = bytearray((tmp_path / "data/b.parquet").read_bytes())
    data[4:400] = bytes(396)  # its pages, not its footer
    (tmp_path / "data/b.parquet").write_bytes(data)
    write_parquet(tmp_path / "data/c.parquet", good(base, 5))
    asked.clear()
    line = run(*command, code=1, **ACCESS).one_line()
    assert "damaged file" in line
    assert "b.parquet" in line
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [Status.OK] * 400
    assert Shard(tmp_path / "out/c.h5").status.tolist() == [Status.OK] * 5
    assert asked.total() <= 400 - 128 + 5


def test_its_workers_run_the_trials_of_a_sweep(cluster: tuple[str, Node, Node], tmp_path: Path) -> None:
    flags = flags_of(config(write_runs(tmp_path), tmp_path / "out", max_steps=4, eval_every=2))
    space = (
        "--space",
        "lr=1e-3,1e-2",
        "weight_decay=0,1e38",
        "--together",
        "auto",
        "--ray",
        cluster[0],
        "--json",
    )
    ended = run("train", "sweep", *flags, *space, **ACCESS)
    assert (ended.summary["finished"], ended.summary["failed"]) == (2, 2)
    assert ended.summary["best"] == {"trial": ended.summary["best"]["trial"], "lr": 1e-2, "weight_decay": 0.0}
    assert "trial 0 (lr=0.001 weight_decay=0): held-out loss " in ended.err
    assert (tmp_path / "out/best/model.safetensors").exists()
    assert (tmp_path / "out/index.html").exists()


def test_workers_share_the_files(base: str, vision: Path, tmp_path: Path) -> None:
    for name in "abcde":
        write_parquet(tmp_path / f"data/{name}.parquet", good(base, 4))
    flags = ("--data", "data", "--out", "out", "--vision", vision, "--allow-private", "--limit", 10, "--json")
    task = {"SLURM_ARRAY_TASK_ID": 4, "SLURM_ARRAY_TASK_MIN": 1, "SLURM_ARRAY_TASK_COUNT": 4}
    variables = (
        {"RANK": 0, "WORLD_SIZE": 2},
        {"RANK": 1, "WORLD_SIZE": 2},
        task,
        {"RANK": 2, "WORLD_SIZE": 2},
    )
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(started("extract", "run", *flags, cwd=tmp_path, **each)) for each in variables
        ]
        ended = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0, 2], ended
    told = ("worker 1 of 2: 2 of 3 sources", "worker 2 of 2: 1 of 3 sources", "worker 4 of 4: 0 of 3 sources")
    for line, (_, err) in zip(told, ended, strict=False):
        assert line in err
    assert [json.loads(out.splitlines()[-1])["ok"] for out, _ in ended[:3]] == [6, 4, 0]
    assert ended[3][1].startswith("error: RANK and WORLD_SIZE make no sense; expected RANK from 0 to")
    rows = [Shard(tmp_path / f"out/{name}.h5").rows for name in "abc"]
    assert rows == [4, 4, 2]
