"""`extract` killed, interrupted, out of disk, run twice at a time: nothing is lost, nothing done twice."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.stages.write import Write
from llava_core.row_status import Status
from llava_core.shards.journal import HEADER_BYTES, RECORD
from llava_core.shards.reader import Shard
from tests.support.commands import call, fill, holder, started, wait_until
from tests.support.pictures import asked, features_are_right, good, write_parquet


def writes(process: subprocess.Popen[str], out: Path) -> bool:
    """Whether it has begun to fill a shard, or has ended."""
    return process.poll() is not None or any(holder(path) == process.pid for path in out.glob("*.lock"))


@pytest.mark.parametrize(
    ("kills", "shards", "rows", "longest"),
    [(8, 3, 400, 0.5), pytest.param(50, 5, 2000, 0.8, marks=pytest.mark.slow)],
)
def test_rows_killed_at_any_moment_end_up_exactly_once(
    base: str, vision: Path, tmp_path: Path, kills: int, shards: int, rows: int, longest: float
) -> None:
    for part in range(shards):
        write_parquet(tmp_path / f"data/{part}.parquet", good(base, rows, start=rows * part))
    flags = ("--data", tmp_path / "data", "--vision", vision, "--allow-private", "--batch-size", 8,
             "--concurrency", 8)  # fmt: skip
    rng, killed = random.Random(0), 0
    command = ("extract", "run", *flags, "--thumbnails", "--out", tmp_path / "killed")
    while killed < kills:
        with started(*command) as process:
            wait_until(process, lambda: writes(process, tmp_path / "killed"))
            time.sleep(rng.uniform(0, longest))
            if process.poll() is not None:
                break
        killed += 1
    assert killed >= kills / 2  # a fast machine may be done before
    print(f"{killed} kills")
    call(*command)
    call("extract", "run", *flags, "--out", tmp_path / "undisturbed")
    left = sorted(p.name for p in (tmp_path / "killed").glob("*.h5*"))
    assert left == [f"{part}.h5" for part in range(shards)]
    for part in range(shards):
        shard, whole = Shard(tmp_path / f"killed/{part}.h5"), Shard(tmp_path / f"undisturbed/{part}.h5")
        assert shard.status.tolist() == [Status.OK] * rows
        for row in range(rows):  # the batch a row was encoded in may differ, and with it the last bit
            assert shard.check(row)
            assert shard.thumbnail(row)
            assert shard.url(row) == whole.url(row)
            np.testing.assert_allclose(shard.read(row), whole.read(row), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_keeps_what_is_encoded(
    base: str, vision: Path, tmp_path: Path, signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = itertools.count(1), Write._take

    def take_some(*arguments: Any) -> None:
        take(*arguments)
        if next(taken) == 30:  # all but the slow one, and none is on disk yet
            signal.raise_signal(signum)

    write_parquet(tmp_path / "data/a.parquet", [*good(base, 30), f"{base}/slow"])
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private",
             "--batch-size", 4, "--retries", 0)  # fmt: skip
    before = asked.total()
    with monkeypatch.context() as patch:
        patch.setattr(Write, "_take", take_some)
        err = call("extract", "run", *flags, code=130).err
    assert "the same command continues" in err
    assert "Traceback" not in err
    assert (tmp_path / "out/a.h5.part").exists()
    call("extract", "run", *flags, "--timeout", 1)
    assert asked.total() - before == 30  # nothing was downloaded twice
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [1] * 30 + [7]


def kill_once_written(*command: object, journal: Path) -> None:
    with started(*command) as process:
        wait_until(process, lambda: journal.exists() and journal.stat().st_size > HEADER_BYTES)


def test_words_may_change_after_each_kill(base: str, vision: Path, tmp_path: Path) -> None:
    urls = [*good(base, 20), f"{base}/slow", *good(base, 4, start=20)]
    out, data = tmp_path / "out", tmp_path / "data/a.parquet"
    command = ("extract", "run", "--data", data, "--vision", vision, "--out", out, "--allow-private",
               "--batch-size", 4, "--concurrency", 4, "--retries", 0, "--max-failed", 1)  # fmt: skip

    def captioned(name: str, slow: str | None) -> list[str | None]:
        captions = [f"{name} {row}" if row != 20 else slow for row in range(len(urls))]
        write_parquet(data, urls, captions)
        return captions

    captioned("first", "slow")
    kill_once_written(*command, journal=out / "a.h5.journal")
    encoded = journal_rows(out / "a.h5.journal")
    before = asked.total()
    captioned("second", None)
    err = call(*command).err
    assert "the texts of 25 rows changed; its images are not encoded again" in err
    assert asked.total() - before <= len(urls) - 1 - len(encoded)
    before = asked.total()
    for name in ("third", "fourth"):  # a mend, and another one of the words before it
        captioned(name, "slow")
        kill_once_written(*command, journal=out / "a.h5.journal")
    captions = captioned("fifth", None)
    assert "was begun with texts that have changed since, and is started again" in call(*command).err
    assert asked.total() == before
    assert "nothing to do" in call(*command).err
    shard = Shard(out / "a.h5")
    assert [shard.caption(row) or None for row in range(shard.rows)] == captions
    assert shard.ok_rows() == [row for row in range(shard.rows) if row != 20]
    assert sorted(path.name for path in out.iterdir()) == ["a.h5", "a.json"]
    features_are_right(shard, vision)


def test_a_retry_whose_words_change_after_a_kill_keeps_what_it_has(
    base: str, vision: Path, tmp_path: Path
) -> None:
    urls, out, data = [*good(base, 3), f"{base}/slow"], tmp_path / "out", tmp_path / "data/a.parquet"
    command = ("extract", "run", "--data", data, "--vision", vision, "--out", out, "--max-failed", 1,
               "--retries", 0, "--patience", 0)  # fmt: skip
    write_parquet(data, urls, ["a", "b", "c", "d"])
    call(*command, "--no-allow-private")
    retry = (
        "extract",
        "retry-failed",
        "--out",
        out,
        "--vision",
        vision,
        "--allow-private",
        "--batch-size",
        1,
    )
    kill_once_written(*retry, journal=out / "a.h5.journal")
    encoded, before = journal_rows(out / "a.h5.journal"), asked.total()
    write_parquet(data, urls, ["A", "B", "C", "D"])
    call(*command, "--allow-private", "--timeout", 1)
    assert asked.total() - before <= 3 - len(encoded)
    shard = Shard(out / "a.h5")
    assert (shard.ok_rows(), shard.caption(3)) == ([0, 1, 2], "D")
    features_are_right(shard, vision)


def journal_rows(path: Path) -> set[int]:
    data = path.read_bytes()[HEADER_BYTES:]
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
    return set(records["row"].tolist())


def test_two_processes_never_fill_one_shard(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", [*good(base, 4), f"{base}/slow"])
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private",
             "--timeout", 30, "--retries", 0)  # fmt: skip
    with started("extract", "run", *flags) as first:
        wait_until(first, lambda: holder(tmp_path / "out/a.h5.lock") == first.pid)
        assert f"by process {first.pid} on" in call("extract", "run", *flags, code=1).one_line()
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert first.returncode == 130


def test_a_full_disk_ends_it_and_loses_nothing(
    base: str, vision: Path, small_disk: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 600))
    out = small_disk / "out"
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", out, "--allow-private",
             "--concurrency", 4)  # fmt: skip
    with started("extract", "run", *flags) as process:
        wait_until(process, (out / "a.h5.journal").exists)
        filler = fill(small_disk)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith("error: No space left on device")
    assert "Traceback" not in err
    filler.unlink()
    before = asked.total()
    call("extract", "run", *flags)
    assert Shard(out / "a.h5").status.tolist() == [Status.OK] * 600
    assert asked.total() - before <= 600
    (small_disk / "filler").write_bytes(bytes(300_000))
    line = call("extract", "run", *flags[:4], "--out", small_disk / "again", code=1).one_line()
    assert "not enough disk space" in line
    assert not list((small_disk / "again").glob("*.tmp"))
