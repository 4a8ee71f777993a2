"""The pages of docs/use about other programs and the course: their code as it stands, on small models.

Ollama and llama.cpp's own programs come from no package: their lines are only held to name files that are
there. llama.cpp itself runs as xllamacpp, and its answers are compared in test_export_gguf.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_align.config import MODELS
from llava_core.projector.checkpoint import load_checkpoint
from tests.e2e.test_docs_code import blocks
from tests.e2e.test_serve_clients import CLIENTS
from tests.support.aligned import write_checkpoint
from tests.support.commands import ENVIRONMENT, call, run
from tests.support.llava_server import Served, llava_server
from tests.support.local_data import write_parquet, write_pictures

PROGRAMS = {"llama-server", "llama-mtmd-cli", "ollama"}
ADDRESS = "http://127.0.0.1:8000"
SHORT = 16
"""Most tokens of an answer: the small models know no end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted, under the names they use."""
    folder = tmp_path_factory.mktemp("targets")
    for name, model in (("clip", "vision"), ("qwen3", "llm")):
        shutil.copytree(MODELS / model, folder / "models" / name)
    clip, qwen3 = folder / "models/clip", folder / "models/qwen3"
    write_checkpoint(folder / "runs/linear/best", clip, qwen3, "linear", "pool", None, "exact")
    picture = np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((96, 96)).save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    names = {"checkpoint": "runs/linear/best", "vision": "models/clip", "llm": "models/qwen3"}
    flags = [text for name, path in names.items() for text in (f"--{name}", folder / path)]
    with llava_server(*flags, "--device", "cpu", "--max-tokens", SHORT) as served:
        yield served


def run_lines(page: str, folder: Path) -> None:
    """The first bash block: our own commands, and other programs' with files that are there."""
    for line in blocks(page, "bash")[0].splitlines():
        program, *arguments = shlex.split(line)
        if program == "python":
            module, *flags = arguments[1:]
            run(module, *flags, *(("--check", 1) if "gguf" in flags else ()), cwd=folder)
        else:
            assert program in PROGRAMS
            files = [
                word for word in " ".join(arguments).split() if word.startswith("gguf/") or ".jpg" in word
            ]
            assert files
            assert not [name for name in files if not (folder / name).exists()]


def run_python(code: str, folder: Path, timeout: float = 120) -> str:
    environment = {**ENVIRONMENT, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(CLIENTS)])},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("page", ["transformers", "llama-cpp", "ollama"])
def test_an_exported_model_runs_as_its_page_says(page: str, folder: Path) -> None:
    for name in ("exported", "gguf"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run_lines(f"use/{page}.md", folder)
    for code in blocks(f"use/{page}.md", "python"):
        assert run_python(code, folder).strip()


def test_clients_ask_the_server_as_their_page_says(folder: Path, served: Served) -> None:
    page = "use/clients.md"
    _, curl, llm = [block.replace(ADDRESS, served.base) for block in blocks(page, "bash")]
    codes = [block.replace(ADDRESS, served.base) for block in blocks(page, "python")]
    openai = codes[0]
    answer = run_python(openai, folder).removesuffix("\n")
    assert answer

    if shutil.which("curl"):
        asked = ["bash", "-c", curl]
        got = subprocess.run(asked, cwd=folder, capture_output=True, check=True, timeout=60).stdout
        assert json.loads(got)["choices"][0]["message"]["content"] == answer

    (settings,) = blocks(page, "yaml")
    user = folder / "llm"
    user.mkdir(exist_ok=True)
    (user / "extra-openai-models.yaml").write_text(settings.replace(ADDRESS, served.base))
    command = [sys.executable, "-m", *shlex.split(llm), "-o", "temperature", "0"]
    environment = {**ENVIRONMENT, "LLM_USER_PATH": str(user)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout.removesuffix("\n") == answer, ended.stderr

    for client, code in zip(("langchain_openai", "litellm"), codes[1:], strict=True):
        if (CLIENTS / client).exists():
            assert run_python(f"{openai}\n{code}", folder).removesuffix("\n").split("\n")[-1] in answer

    if (CLIENTS / "node_modules/openai").exists() and shutil.which("node"):
        (script,) = [block.replace(ADDRESS, served.base) for block in blocks(page, "js")]
        (CLIENTS / "ask.mjs").write_text(script, encoding="utf-8")
        try:
            node = ["node", str(CLIENTS / "ask.mjs")]
            ended = subprocess.run(node, cwd=folder, capture_output=True, text=True, timeout=60)
        finally:
            (CLIENTS / "ask.mjs").unlink()
        assert ended.stdout.removesuffix("\n") == answer, ended.stderr


def test_the_course_project_goes_on_here_as_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both stages, and the projector that its scripts saved, on the demo's models and its data's layouts."""
    for name, model in (("clip", "vision"), ("qwen3", "llm")):
        shutil.copytree(MODELS / model, tmp_path / "models" / name)
    for split, names in (("sa1b", ["1.png", "2.png", "3.png"]), ("sa1b-eval", ["4.png", "5.png"])):
        write_pictures(tmp_path / split, names)
        words = [json.dumps({"global_caption": f"图 {name}"}) for name in names]
        write_parquet(tmp_path / split / "train-00000.parquet", path=names, cap_seg=words)
    for number in (1, 2):
        talk = tmp_path / f"llava_instruction_{number}_formate"
        write_pictures(talk / "images", ["1.png", "2.png"])
        (talk / "labels_zh").mkdir()
        turns = [{"role": "user", "content": "什么？"}, {"role": "assistant", "content": "猫"}]
        for row in (1, 2):
            (talk / f"labels_zh/{row}.json").write_text(json.dumps(turns), encoding="utf-8")
    shutil.copy(tmp_path / "sa1b/1.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    both, imported = blocks("use/from-the-course.md", "bash")[:2]
    for line in both.replace("\\\n", "").splitlines():
        if line:
            call(*shlex.split(line)[2:], "--device", "cpu")
    projector = load_checkpoint(tmp_path / "runs/linear/best").projector.map
    torch.save(projector.state_dict(), tmp_path / "stage1_projection.pt")
    for line in imported.replace("\\\n", "").splitlines():
        device = () if " import " in line else ("--device", "cpu")
        call(*shlex.split(line)[2:], *device)
    assert (tmp_path / "runs/course-stage2/best/llm").is_dir()
