"""The code blocks of docs/reference/python-api.md and docs/develop/extending.md, run as they stand."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_core.input_folders import registered_layout
from llava_core.registry import PROJECTORS, VISION_ENCODERS, VISUAL_TOKENS
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import write_aligned
from tests.support.commands import call
from tests.support.entry_points import install
from tests.support.paths import ROOT
from train.config import RunConfig


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [
        block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind == language
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the pages take for granted, under the names they use."""
    world = write_aligned(tmp_path / "world")
    (tmp_path / "models").mkdir()
    shutil.copytree(world.vision, tmp_path / "models/clip")
    shutil.copytree(world.llm, tmp_path / "models/qwen3")
    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    for number, image in enumerate(world.images):
        for name in ("photos", "other"):
            shutil.copy(image, tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"A {name} shape, number {number}.")
    monkeypatch.chdir(tmp_path)
    for source in blocks("develop/extending.md", "python"):
        name = source.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(source, encoding="utf-8")
    held_out = ("--data", "other", "--vision", "models/clip", "--out", "features/held-out", "--device", "cpu")
    call("extract", "run", *held_out)
    yield tmp_path
    for registry in (PROJECTORS, VISUAL_TOKENS, VISION_ENCODERS):
        registry.registered.clear()
    for name in ("my_projector", "my_tokens", "my_encoder"):
        sys.modules.pop(name, None)


def test_the_python_api_page_and_the_extending_page(folder: Path) -> None:
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks("reference/python-api.md", "python"):
            exec(compile(block, "python-api.md", "exec"), names)
    assert "5 of 5 images encoded\n" in out.getvalue()
    assert "\nruns/mlp/best " in out.getvalue()
    assert "torch.float16 (" in out.getvalue()
    assert (folder / "runs/gated/last/config.json").exists()

    commands, _ = blocks("develop/extending.md", "bash")
    shutil.rmtree("runs")
    for line in commands.splitlines():
        _, _, *command = shlex.split(line)
        call(*command, "--batch-size", 4, "--max-steps", 2, "--device", "cpu")
    assert (folder / "runs/sweep/best/config.json").exists()
    RunConfig(features=Path(), llm=Path(), out=Path(), visual_tokens="my_tokens:Every2nd")  # or refuse

    (folder / "models/quarters").mkdir()
    (folder / "models/quarters/quarters.json").write_text('{"side": 8}')
    VISION_ENCODERS.get("my_encoder:Quarters")  # imports the module, which registers it
    assert registered_layout(folder / "models/quarters") is not None
    tower = open_vision_tower(folder / "models/quarters")
    pixels = tower.preprocess.decode_image((folder / "photos/0.png").read_bytes()).pixels
    assert tuple(tower.encode(pixels[None]).shape) == (1, 4, 48)


def test_the_package_of_the_extending_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project,) = blocks("develop/extending.md", "toml")
    _, commands = blocks("develop/extending.md", "bash")
    groups = re.findall(r'^\[project\.entry-points\."(.+)"\]\n((?:.+\n)+)', project, re.M)
    install(folder, "".join(f"[{group}]\n{names}" for group, names in groups).replace('"', ""))
    monkeypatch.syspath_prepend(folder)
    (folder / "models/quarters").mkdir()
    (folder / "models/quarters/quarters.json").write_text('{"side": 8}')
    extract, train = (shlex.split(line)[2:] for line in commands.splitlines())
    call(*extract, "--device", "cpu")
    call(*train, "--batch-size", 4, "--max-steps", 2, "--device", "cpu")
    recorded = json.loads((folder / "runs/quarters/last/config.json").read_text())["projector"]
    assert (recorded["depth"], recorded["visual_tokens"]) == (3, "my_tokens:Every2nd")
