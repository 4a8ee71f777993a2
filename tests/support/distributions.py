"""What is installed without a checkout: the Dockerfile's build context, the sdist, the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("llava_core", "extract", "train", "infer", "llava_align")


def without(folder: Path, *packages: str) -> Path:
    """A folder for PYTHONPATH, with which these packages are as good as not installed."""
    for name in packages:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('no {name} here')")
    return folder


def build_context(into: Path) -> Path:
    """A copy of what .dockerignore, a list of exceptions to `*`, lets into the image's build."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert (rules[0], rules[-1]) == ("*", "**/__pycache__")
    into.mkdir()
    for rule in rules[1:-1]:
        path = ROOT / rule.removeprefix("!")
        if path.is_dir():
            shutil.copytree(path, into / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, into)
    return into


def build(source: Path, kind: str) -> Path:
    """The "wheel" or "sdist" of a source folder, in its `dist`. Skips the test without a setuptools."""
    pytest.importorskip("setuptools", minversion="77", reason=f"builds the {kind}")
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("llava_align-*.whl" if kind == "wheel" else "llava_align-*.tar.gz")
    return built


def wheel_of_sdist(folder: Path) -> Path:
    """The wheel that pip would build of our sdist. `folder` is empty."""
    context = build_context(folder / "context")
    shutil.copytree(ROOT / "llava", context / "llava")  # which is in no package
    with tarfile.open(build(context, "sdist")) as sdist:
        sdist.extractall(folder, filter="data")
    (source,) = folder.glob("llava_align-*")
    return build(source, "wheel")
