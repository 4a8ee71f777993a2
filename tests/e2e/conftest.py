"""A server of pictures, a small vision folder, and a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.local_data import NAMES, write_pictures
from tests.support.pictures import image, picture, slow
from tests.support.runs import write_runs
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder


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


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    """Pictures beside the data of a test, under NAMES."""
    return write_pictures(tmp_path, NAMES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` needs; whoever needs what `infer` does has a `world` of its own."""
    return write_runs(tmp_path_factory.mktemp("world"))


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
