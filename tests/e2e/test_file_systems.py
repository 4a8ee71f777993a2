"""File systems, such as those over a network or FUSE, that lack locks, flushes or links."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import NoReturn

import pytest

from llava_core import filesystem as files
from llava_core.shards.reader import Shard
from tests.support.commands import call
from tests.support.pictures import good, write_parquet
from tests.support.runs import config, curve, flags_of

LOCKS = "its file system has no locks"
FLUSHES = "its file system does not wait for the disk"


class Lacking:
    """What a file system answers to what it does not have."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, *arguments: object) -> NoReturn:
        raise OSError(self.number, os.strerror(self.number))


@pytest.fixture
def lacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, Lacking(request.param))
    monkeypatch.setattr(fcntl, "flock", Lacking(request.param))
    monkeypatch.setattr(files, "_warned", set())


EACH = pytest.mark.parametrize(
    "lacking", [errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP], indirect=True
)


@EACH
@pytest.mark.usefixtures("lacking")
def test_extract_says_once_what_is_missing_and_goes_on(base: str, vision: Path, tmp_path: Path) -> None:
    for part in range(2):
        write_parquet(tmp_path / f"data/{part}.parquet", good(base, 3))
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private")
    err = call("extract", "run", *flags).err
    assert err.count(f"{tmp_path / 'out'}: {LOCKS}") == err.count(f": {FLUSHES}") == 1, err
    assert [Shard(path).status.tolist() for path in sorted(tmp_path.glob("out/*.h5"))] == [[1, 1, 1]] * 2
    assert "nothing to do" in call("extract", "run", *flags).err


@pytest.mark.parametrize("lacking", [errno.EINVAL], indirect=True)
@pytest.mark.usefixtures("lacking")
def test_a_run_and_a_sweep_go_on_too(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", max_steps=2, eval_captions=0)
    err = call("train", "run", *flags_of(given)).err
    assert err.count(LOCKS) == err.count(FLUSHES) == 1, err
    assert sorted(curve(tmp_path / "run")) == [1, 2]
    sweep = flags_of(config(world, tmp_path / "sweep", max_steps=2, eval_captions=0))
    assert call("train", "sweep", *sweep, "--space", "seed=0,1", "--json").summary["finished"] == 2


@pytest.mark.parametrize("lacking", [errno.EIO], indirect=True)
@pytest.mark.usefixtures("lacking")
def test_a_broken_disk_is_another_matter(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 3))
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private")
    assert "Input/output error" in call("extract", "run", *flags, code=1).one_line()


def test_without_links_a_run_says_what_is_wrong_with_the_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "symlink", Lacking(errno.EPERM))
    given = config(world, tmp_path / "run", max_steps=2, eval_captions=0)
    line = call("train", "run", *flags_of(given), code=1).one_line()
    assert f"no symbolic link can be made in {tmp_path / 'run'}" in line
