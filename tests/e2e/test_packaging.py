"""What runs without a checkout: the wheel, by way of the sdist, and the image that the Dockerfile builds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support.distributions import PACKAGES, build, build_context
from tests.support.paths import ROOT

SHIMS = ("apt-get", "chown", "mkdir", "pip", "rm", "useradd")
"""Commands of the Dockerfile, which here are written down instead of run; pip installs, into a folder."""


def test_it_has_every_file_of_the_packages(site: Path) -> None:
    for name in PACKAGES:
        files = [
            path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = [path for path in files if not (site / path.relative_to(ROOT)).exists()]
        assert not [path for path in missing if path.name != "README.md"]


def test_the_wheel_of_the_sdist_is_that_of_the_checkout(site: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(build_context(tmp_path / "context"), "wheel")) as wheel:
        direct = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("RECORD")}
    files = [path for path in site.rglob("*") if path.is_file() and path.name != "RECORD"]
    assert {str(path.relative_to(site)): path.read_bytes() for path in files} == direct
    assert {name.split("/")[0].split("-")[0] for name in direct} == set(PACKAGES)


def test_it_works_beside_llava(site: Path, tmp_path: Path) -> None:
    """A package of LLaVA's own, which is called `llava`."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/__init__.py").write_text("from .model import LlavaLlamaForCausalLM\n")
    (tmp_path / "llava/model.py").write_text("LlavaLlamaForCausalLM = object\n")
    code = (
        "import llava, llava_align, extract, train, infer, llava_core\n"
        "from llava import LlavaLlamaForCausalLM\n"
        "print(*(module.__file__ for module in (llava_align, extract, train, infer, llava_core)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{site}:{tmp_path}"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert all(Path(file).is_relative_to(site) for file in ended.stdout.split())


def test_the_old_name_still_runs_from_a_checkout() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "llava", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "doctor" in ended.stdout


def dockerfile() -> list[tuple[str, str]]:
    """The instructions, as name and rest, with continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def run_steps(context: Path, shims: Path, pip: str = "", **arguments: str) -> list[list[str]]:
    """Run the RUN lines with SHIMS alone on PATH, of which pip goes on with `pip`; returns their calls."""
    log = shims / "called"
    shims.mkdir()
    for name in SHIMS:
        script = f'#!/bin/sh\nprintf "%s\\n" {name} "$@" "" >>{log}\n{pip if name == "pip" else ""}\n'
        (shims / name).write_text(script)
        (shims / name).chmod(0o755)
    variables = {"PATH": str(shims), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **arguments}
    for name, rest in dockerfile():
        if name == "RUN":
            subprocess.run(["/bin/sh", "-ec", rest], cwd=context, env=variables, check=True)
    return [call.split("\n") for call in log.read_text().strip("\n").split("\n\n")]


def test_the_image_builds_and_answers(tmp_path: Path) -> None:
    """Without Docker: each step of the Dockerfile runs, and what they leave is the command that it names."""
    steps = dict(dockerfile())
    assert [rest for name, rest in dockerfile() if name == "COPY"] == [". ."]
    context = build_context(tmp_path / "context")
    here = f"--prefix {tmp_path / 'usr'} --ignore-installed --no-deps --no-build-isolation -q"
    called = run_steps(context, tmp_path / "shims", f'exec {sys.executable} -m pip "$@" {here}')
    (apt,) = (call for call in called if call[:2] == ["apt-get", "install"])
    setup = (ROOT / "scripts/setup.sh").read_text(encoding="utf-8")
    assert all(re.search(rf"debian .*\b{package}\b", setup) for package in apt[2:] if package[0] != "-")
    (added,) = (call for call in called if call[0] == "useradd")
    environment = dict(pair.split("=") for pair in shlex.split(steps["ENV"]))
    assert steps["USER"] == environment["USER"] == added[-1] != "root"
    assert ["chown", added[-1], steps["VOLUME"]] in called
    assert steps["WORKDIR"] == steps["VOLUME"] == environment["HOME"] == added[added.index("--home-dir") + 1]
    (pip,) = (call for call in called if call[0] == "pip")
    (extras,) = re.findall(r"^\.\[(.*)\]$", pip[-1])
    (metadata,) = tmp_path.glob("usr/lib/*/site-packages/llava_align-*/METADATA")
    offered = re.findall(r"^Provides-Extra: (.*)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(extras.split(",")) <= set(offered)

    scripts = tmp_path / "usr/bin"
    command, *arguments = json.loads(steps["CMD"])
    for name in (command, "llava-extract", "llava-train", "llava-infer"):
        ended = subprocess.run(
            [scripts / name, *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={"PYTHONPATH": str(metadata.parents[1]), "HOME": str(tmp_path), "USER": "llava"},
        )  # fmt: skip
        assert (ended.returncode, "COMMAND --help" in ended.stdout) == (0, True), ended.stderr


def test_the_image_takes_a_torch_for_another_cuda(tmp_path: Path) -> None:
    assert ("ARG", 'TORCH_INDEX=""') in dockerfile()
    called = run_steps(tmp_path, tmp_path / "shims", TORCH_INDEX="https://torch.example/an index")
    (pip,) = (call for call in called if call[0] == "pip")
    assert pip[pip.index("--extra-index-url") + 1] == "https://torch.example/an index"
