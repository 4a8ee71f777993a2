"""The wheel: what is in it, and that it works beside LLaVA's own package, which is called `llava`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("llava_core", "extract", "train", "infer", "llava_align")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages: our wheel, unpacked, and a stand-in for LLaVA's."""
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel")
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "llava", source / "llava")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    site = tmp_path_factory.mktemp("site")
    (wheel,) = (source / "wheels").glob("llava_align-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "llava").mkdir()  # fails if the wheel has one
    (site / "llava/__init__.py").write_text("from .model import LlavaLlamaForCausalLM\n")
    (site / "llava/model.py").write_text("LlavaLlamaForCausalLM = object\n")
    return site


def test_it_has_every_file_of_the_packages(site: Path) -> None:
    for name in PACKAGES:
        files = [
            path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = [path for path in files if not (site / path.relative_to(ROOT)).exists()]
        assert not [path for path in missing if path.name != "README.md"]


def test_it_works_beside_llava(site: Path, tmp_path: Path) -> None:
    code = (
        "import llava, llava_align, extract, train, infer, llava_core\n"
        "from llava import LlavaLlamaForCausalLM\n"
        "print(*(module.__file__ for module in (llava, llava_align, extract, train, infer, llava_core)))\n"
        "from llava_align.config import MODELS\n"
        "from llava_core.language.load import load_language_model\n"
        "print(load_language_model(MODELS / 'llm').id)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    files, model = ended.stdout.splitlines()
    assert all(Path(file).is_relative_to(site) for file in files.split())
    assert model == "llm"


def test_the_old_name_still_runs_from_a_checkout() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "llava", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "doctor" in ended.stdout
