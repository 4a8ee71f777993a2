"""`extract verify` on shards that were really damaged."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from extract.sources.refetch import ImageRefetcher
from llava_core.errors import LlavaError
from llava_core.network.fetch import Fetched
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from tests.support.commands import ENVIRONMENT, call, run
from tests.support.paths import GOLDEN, ROOT
from tests.support.pictures import good, image, write_parquet
from tests.support.servers import serving
from tests.support.shards import reseal
from tests.support.vision_encoders import write_vision_folder


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with serving({"/{name:\\d+.jpg}": image}) as url:
        yield url


@pytest.fixture(scope="module")
def whole(base: str, vision: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of twelve rows each, as `extract run` makes them."""
    folder = tmp_path_factory.mktemp("whole")
    write_parquet(folder / "data/a.parquet", good(base, 12))
    write_parquet(folder / "data/b.parquet", good(base, 12, start=12))
    call("extract", "run", "--data", folder / "data", "--out", folder / "out", "--vision", vision,
        "--allow-private")  # fmt: skip
    return folder / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def put(path: Path, row: int, features: np.ndarray, with_checksum: bool = False) -> None:
    """Write the features of a row, fp16 [T, D], where they lie in the file."""
    shard = Shard(path)
    with path.open("r+b") as file:
        data = np.ascontiguousarray(features, "<f2").tobytes()
        os.pwrite(file.fileno(), data, shard.layout.offsets["features"] + row * len(data))
        if with_checksum:
            digest = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
            os.pwrite(file.fileno(), digest, shard.layout.offsets["xxh3"] + 8 * row)
    if with_checksum:
        reseal(path)


def swap(path: Path, one: int, other: int, with_checksum: bool = False) -> None:
    shard = Shard(path)
    first, second = shard.read(one), shard.read(other)
    put(path, one, second, with_checksum)
    put(path, other, first, with_checksum)


def faults(summary: dict[str, Any]) -> dict[tuple[str, int | None], str]:
    return {(fault["shard"], fault["row"]): fault["fault"] for fault in summary["faults"]}


def test_checksums_name_damaged_and_exchanged_rows(out: Path) -> None:
    a, b = out / "a.h5", out / "b.h5"
    flipped = Shard(b).read(3)
    flipped.view(np.uint16)[1, 5] ^= 1 << 9
    put(b, 3, flipped)
    swap(b, 5, 7)
    put(b, 2, Shard(a).read(1))
    for row in (8, 9):
        put(b, row, np.zeros_like(flipped))
    ended = run("extract", "verify", "--out", out, "--json", code=1)
    assert faults(ended.summary) == {
        ("b.h5", 2): "holds the features of row 1 of a.h5",
        ("b.h5", 3): "is damaged",
        ("b.h5", 5): "holds the features of row 7",
        ("b.h5", 7): "holds the features of row 5",
        ("b.h5", 8): "is damaged",
        ("b.h5", 9): "is damaged",
    }
    assert (ended.summary["checked"], ended.summary["damaged_rows"]) == (24, 6)
    assert ended.one_line() == (
        "error: 6 of 24 rows do not have their checksum; got b.h5: row 2 holds the features of row 1 of "
        "a.h5, b.h5: row 3 is damaged, b.h5: row 5 holds the features of row 7, b.h5: row 7 holds the "
        "features of row 5, b.h5: row 8 is damaged and 1 more; `extract retry-failed --out "
        f"{out} --status damaged` makes them again"
    )


def test_encoding_again_names_rows_whose_checksums_were_exchanged_too(out: Path, vision: Path) -> None:
    a, b = out / "a.h5", out / "b.h5"
    swap(a, 2, 6, with_checksum=True)
    put(b, 0, Shard(b).read(4), with_checksum=True)
    put(b, 9, np.random.default_rng(0).normal(size=Shard(b).read(9).shape), with_checksum=True)
    put(b, 11, np.zeros_like(Shard(b).read(11)))  # found by its checksum, so not encoded again
    command = ("extract", "verify", "--out", out, "--vision", vision, "--allow-private", "--json")
    ended = call(*command, "--sample", 0, code=1)
    found = faults(ended.summary)
    assert found.pop(("b.h5", 9)).endswith(" away")
    assert found == {
        ("a.h5", 2): "holds the features of row 6",
        ("a.h5", 6): "holds the features of row 2",
        ("b.h5", 0): "holds the features of row 4",
        ("b.h5", 11): "is damaged",
    }
    assert (ended.summary["encoded_again"], ended.summary["changed_rows"]) == (23, 4)
    assert "4 of 23 rows encoded again are not what the encoder gives" in ended.one_line()
    assert "1 of 24 rows do not have their checksum; got b.h5: row 11 is damaged" in ended.one_line()


def test_images_without_an_answer_are_not_said_to_have_changed(
    out: Path, vision: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [Fetched(Status.CONNECT)] * 3 + [Fetched(Status.OK, b"another")]
    monkeypatch.setattr(ImageRefetcher, "load", lambda self, rows, limits, done: answers)
    ended = call("extract", "verify", "--out", out, "--vision", vision, "--sample", 4)
    line = "0 of 4 sampled images are still what they were; 3 could not be had: 3 connect"
    assert line in ended.err.splitlines()


def test_every_shard_of_another_encoder_is_named(base: str, out: Path, vision: Path, tmp_path: Path) -> None:
    other = write_vision_folder(tmp_path / "other", seed=3)
    for name in "cd":
        write_parquet(tmp_path / f"data/{name}.parquet", good(base, 5))
    flags = ("--allow-private", "--decode", "exact")
    call("extract", "run", "--data", tmp_path / "data", "--out", out, "--vision", other, *flags)

    command = ("extract", "verify", "--out", out, "--allow-private", "--json", "--vision")
    ended = call(*command, vision, code=1)
    assert ended.summary["stale_shards"] == 2
    assert set(faults(ended.summary)) == {("c.h5", None), ("d.h5", None)}
    line = ended.one_line()
    assert line.startswith(
        f"error: shards of another encoder than {vision.name}: 2 of 4; got c.h5 differs in weights_sha256: "
    )
    assert 'decode: "draft" vs "exact", d.h5 differs in weights_sha256: ' in line
    assert (ended.summary["checked"], ended.summary["encoded_again"]) == (34, 16)  # of a and b
    assert ended.summary["changed_rows"] == 0

    (out / "a.h5").unlink()
    alone = call("extract", "verify", "--out", out, "--json", code=1)
    assert alone.one_line().startswith(
        "error: shards of another encoder than most have: 1 of 3; got b.h5 differs in "
    )


def test_downloads_show_a_bar(out: Path, vision: Path) -> None:
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = ["extract", "verify", "--out", out, "--vision", vision, "--allow-private"]
    with subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, env=ENVIRONMENT, stderr=its_end, text=True,
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        os.close(its_end)
        shown = b""
        try:
            while data := os.read(terminal, 4096):
                shown += data
        except OSError:  # what Linux says of a terminal whose other end is closed
            pass
        os.close(terminal)
    assert process.returncode == 0, shown
    assert b"checksums: 100%" in shown
    assert b"encode again: 100%" in shown
    assert b"16/16" in shown


def test_usage(out: Path) -> None:
    line = call("extract", "verify", "--out", out, "--sample", -1, code=2).one_line()
    assert line == "error: --sample; expected 0 (every row) or more; got -1"


def test_damaged_rows_are_made_again_on_request(out: Path, vision: Path) -> None:
    before = Shard(out / "b.h5").read(3)
    put(out / "b.h5", 3, np.zeros_like(before))
    again = ("extract", "retry-failed", "--out", out, "--vision", vision, "--allow-private", "--json")
    assert "0 failed rows" in call(*again).err
    ended = call(*again, "--status", "damaged")
    assert "1 failed row in 1 of 2 shards to try again" in ended.err
    assert ended.summary["ok"] == 24
    np.testing.assert_allclose(Shard(out / "b.h5").read(3), before, rtol=2e-3, atol=2e-3)
    call("extract", "verify", "--out", out)


def test_a_shard_of_version_1_is_said_to_be_checked_in_part(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "version_1/features/a.h5", tmp_path)
    assert "1 shard of format version 1: texts" in call("extract", "verify", "--out", tmp_path).err
    data = bytearray((tmp_path / "a.h5").read_bytes())
    data[Shard(tmp_path / "a.h5").layout.offsets["features"] + 7] ^= 1
    (tmp_path / "a.h5").write_bytes(data)
    line = call("extract", "verify", "--out", tmp_path, code=1).one_line()
    assert "row 0 is damaged" in line
    with pytest.raises(LlavaError, match=r"row 0 of .*a\.h5 is damaged"):
        Shard(tmp_path / "a.h5").read(0)
