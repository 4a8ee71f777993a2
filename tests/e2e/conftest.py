"""A server of pictures, small vision folders, and a small disk."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from tests.support.distributions import wheel_of_sdist
from tests.support.local_data import NAMES, write_pictures
from tests.support.pictures import image, picture, slow
from tests.support.runs import write_runs
from tests.support.servers import answer, serving
from tests.support.vision_encoders import VISION, write_vision_folder


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: ours, as the wheel of the sdist has them."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel_of_sdist(tmp_path_factory.mktemp("sdist"))).extractall(site)
    return site


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


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Chinese-CLIP as ModelScope has it, and DINOv2 as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("encoders")
    write_vision_folder(folder / "clip", vision={**VISION, "vision_layers": 4})
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(folder / "dinov2")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=28, image_mean=[0.5] * 3)
    processor.save_pretrained(folder / "dinov2")
    return folder / "clip", folder / "dinov2"
