"""`extract bench`: stages alone and together over a real server, local data, and finished caches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from extract.bench.command import run as bench
from extract.config import BenchConfig
from llava_core.errors import LlavaError
from llava_core.shards.hdf5_file import read_by_hdf5
from llava_core.shards.quantize import STORAGES, Storage
from llava_core.shards.reader import Shard
from tests.support.commands import call, started, wait_until
from tests.support.local_data import write_pictures
from tests.support.pictures import asked, good, write_parquet
from tests.support.shards import TOKENS, WIDTH, features_of, write_shard

ROW_BYTES = 5 * 64 * 2
"""Of the small vision folder's features."""


def test_stages_alone_and_together(base: str, vision: Path, tmp_path: Path) -> None:
    """Each part has rows of its own over the borders of files, and nothing stays on disk."""
    asked.clear()
    bad = [f"{base}/gone", f"{base}/page", f"{base}/cut", f"{base}/slow"]
    captions: list[Any] = [None, *({"global_caption": "图"} for _ in range(29))]
    write_parquet(tmp_path / "data/a.parquet", [*bad, *good(base, 26)], captions)
    write_parquet(tmp_path / "data/b.parquet", [*good(base, 20, start=26), *bad, *good(base, 50, start=46)])
    where = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "deep/out")
    flags = ("--allow-private", "--timeout", 1, "--retries", 0, "--patience", 0, "--count", 40, "--limit", 90)
    ended = call("extract", "bench", *where, *flags, "--json", code=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    assert asked == {str(i): 1 for i in range(72)}  # 26 + 10 alone, then 10 + 26 together
    found = ended.summary
    assert (found["rows"], found["measured_rows"]) == (90, 40)
    stages = found["stages"]
    assert {name: stage["rows"] for name, stage in stages.items()} == {
        "download": 39, "decode": 39, "encode": 36, "write": 40,
    }  # fmt: skip
    assert found["together"]["rows"] == 40
    assert found["by_status"] == {"ok": 36, "http 4xx": 1, "not an image": 1, "truncated": 1, "timeout": 1}
    assert found["by_http"] == {"http 4xx": {"404": 1}}
    assert "10.0% of the rows failed, over --max-failed 0.05" in ended.err
    slowest = min(stages, key=lambda name: stages[name]["samples_per_s"])
    assert found["bottleneck"] == slowest
    assert found["samples_per_s"] == min(found["together"]["samples_per_s"], stages[slowest]["samples_per_s"])
    assert found["hours"] == pytest.approx(90 / found["samples_per_s"] / 3600)
    assert "40 rows: fewer than 64 do not show the bottleneck\n" in ended.out
    assert "truncated" in ended.out
    assert stages["write"]["mb_per_s"] == pytest.approx(
        stages["write"]["samples_per_s"] * 36 / 40 * ROW_BYTES / 1e6
    )
    assert [stages[name]["busy"] is None for name in stages] == [True, False, False, False]
    assert "rows/s" not in ended.err  # no bar where there is no terminal


def test_few_rows_of_local_images_are_read_twice(vision: Path, tmp_path: Path) -> None:
    names = [f"{i}.jpg" for i in range(7)]
    pictures = write_pictures(tmp_path / "set", names)
    for name in names:
        (tmp_path / "set" / name).with_suffix(".txt").write_text("图", encoding="utf-8")
    found = bench(
        BenchConfig(
            data=str(tmp_path / "set"), vision=vision, out=tmp_path, count=5, device="cpu", dtype="int8"
        )
    )
    assert found["by_status"] == {"ok": 5}
    assert list(found["stages"]) == ["read", "decode", "encode", "write"]
    read = found["stages"]["read"]
    assert read["mb_per_s"] == pytest.approx(read["samples_per_s"] * sum(map(len, pictures[:5])) / 5 / 1e6)
    written = found["stages"]["write"]
    assert written["mb_per_s"] == pytest.approx(written["samples_per_s"] * (5 * 64 + 64 * 2) / 1e6)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_host_that_is_slower_than_all_else_is_named(
    base: str,
    vision: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("extract.bench.command.FEW", 8)
    write_parquet(tmp_path / "data/a.parquet", good(base, 16))
    found = bench(
        BenchConfig(
            data=str(tmp_path / "data"),
            vision=vision,
            out=tmp_path,
            count=8,
            device="cpu",
            host_rate=4,
            allow_private=True,
        )
    )
    assert (found["bottleneck"], found["faster"]) == ("download", "a higher --host-rate (4 now)")
    told = capsys.readouterr().out
    assert "\nbounded by download: 16 rows take about " in told
    assert "; faster with a higher --host-rate (4 now)\n" in told
    assert found["stages"]["download"]["samples_per_s"] < 5  # 8 begin in 7 quarters of a second


def test_nothing_to_encode_is_an_error(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", [f"{base}/gone", f"{base}/page"])
    flags = BenchConfig(
        data=str(tmp_path / "data"), vision=vision, out=tmp_path, device="cpu", allow_private=True
    )
    with pytest.raises(LlavaError, match=r"none of the first rows has an image to encode; got 1 .*, 1 "):
        bench(flags)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_interrupted_it_leaves_nothing(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", [*good(base, 4), f"{base}/slow"])
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path, "--allow-private")
    for signum in (signal.SIGINT, signal.SIGTERM):
        with started("extract", "bench", *flags) as process:
            wait_until(process, lambda: list(tmp_path.glob(".bench-*/a.h5.part")))
            os.killpg(process.pid, signum)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert "is kept" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_cache_is_read_as_training_reads_it(storage: Storage, tmp_path: Path) -> None:
    write_shard(tmp_path / "features/a.h5", rows=30, failed=[3], storage=storage)
    write_shard(tmp_path / "features/b.h5", rows=10, storage=storage)
    ended = call("extract", "bench", "--features", tmp_path / "features", "--count", 33, "--json")
    row_bytes = TOKENS * WIDTH * 2 if storage == "float16" else TOKENS * WIDTH + WIDTH * 2
    found = ended.summary
    assert [found.pop(key) for key in ("rows", "measured_rows", "row_bytes")] == [39, 33, row_bytes]
    assert set(found) == {"as_training_cold", "as_training_warm", "h5py_cold", "h5py_warm"}
    for rate in found.values():
        assert rate["samples_per_s"] > 0
        assert rate["bytes_per_s"] == pytest.approx(rate["samples_per_s"] * row_bytes)
    assert "as training, warm" in ended.out
    shard = Shard(tmp_path / "features/a.h5")
    with read_by_hdf5(shard.path) as read:
        assert read(5).tobytes() == shard.read(5).tobytes()
        np.testing.assert_allclose(read(5), features_of(5), atol=0.02 * (storage == "int8"))


def test_bad_flags_and_folders(vision: Path, tmp_path: Path) -> None:
    data: dict[str, Any] = {"data": str(tmp_path), "vision": vision}
    for flags, message in (
        ({}, "expected --data or --features; got neither"),
        ({**data, "features": tmp_path}, "got both"),
        ({"data": str(tmp_path)}, "say with --vision"),
        ({**data, "count": 0}, "--count; expected a number above 0"),
    ):
        with pytest.raises(LlavaError, match=message) as raised:
            BenchConfig(**flags)
        assert raised.value.exit_code == 2
    assert "got neither" in call("extract", "bench", code=2).one_line()
    with pytest.raises(LlavaError, match="no feature folder"):
        bench(BenchConfig(features=tmp_path / "none"))
    write_shard(tmp_path / "failed/a.h5", rows=2, failed=[0, 1])
    with pytest.raises(LlavaError, match="no row with features"):
        bench(BenchConfig(features=tmp_path / "failed"))
    write_pictures(tmp_path / "set", ["a.jpg"])
    with pytest.raises(LlavaError, match="--count is too high for this machine's memory"):
        bench(BenchConfig(data=str(tmp_path / "set"), vision=vision, device="cpu", count=10**9))
