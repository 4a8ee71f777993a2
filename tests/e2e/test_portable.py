"""The commands on a system without Linux's own calls, as macOS is; devices that are not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_align.config import MODELS
from llava_core.filesystem import read_json_lines
from tests.support.commands import ENVIRONMENT, call, run_each
from tests.support.local_data import write_parquet, write_pictures

LACKING = (
    *("sched_getaffinity", "sched_setaffinity", "fdatasync", "posix_fadvise", "posix_fallocate", "preadv"),
    *("pwritev", "preadv2", "copy_file_range", "sendfile", "memfd_create", "eventfd", "pidfd_open"),
    *("O_DIRECT", "O_TMPFILE", "O_PATH", "POSIX_FADV_DONTNEED", "process_cpu_count"),
)
"""Names of `os` that some systems lack."""
WITHOUT = f"""
import builtins, io, os
for name in {LACKING!r}:
    vars(os).pop(name, None)
opens = builtins.open
def without_proc(file, *arguments, **named):
    if str(file).startswith("/proc/"):
        raise FileNotFoundError(2, "there is no /proc", str(file))
    return opens(file, *arguments, **named)
builtins.open = io.open = without_proc
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, Any]:
    """Variables under which every Python starts without them."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WITHOUT)
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{ENVIRONMENT['PYTHONPATH']}"}


def test_every_command_runs_without_linux(tmp_path: Path, elsewhere: dict[str, Any]) -> None:
    write_pictures(tmp_path / "set", names := [f"{i}.jpg" for i in range(8)])
    write_parquet(tmp_path / "set/data.parquet", image=names, caption=[f"第{i}张图" for i in range(8)])
    data = ("--data", tmp_path / "set/data.parquet", "--vision", MODELS / "vision", "--device", "cpu")
    features, llm = ("--features", tmp_path / "features"), ("--llm", MODELS / "llm", "--device", "cpu")

    given = (*features, "--eval-features", tmp_path / "features", *llm, "--batch-size", 4, "--max-steps", 2)
    models = ("--checkpoint", tmp_path / "run/last", "--vision", MODELS / "vision", *llm, "--max-tokens", 4)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(tmp_path / "set/1.jpg"), "prompt": "看"}))
    commands: list[tuple[object, ...]] = [
        ("extract", "run", *data, "--out", tmp_path / "features"),
        ("extract", "bench", *data, "--count", 4, "--out", tmp_path),
        ("extract", "bench", *features),
        ("train", "run", *given, "--out", tmp_path / "run"),
        ("train", "sweep", *given, "--out", tmp_path / "sweep", "--space", "lr=1e-3,1e-2"),
        ("infer", "ask", *models, "--image", tmp_path / "set/0.jpg"),
        ("infer", "batch", *models, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"),
        ("llava_align", "doctor", "--no-test"),
    ]
    ended = run_each([(*command, "--json") for command in commands], **elsewhere)
    extracted, benched, read, trained, swept, asked, _, doctor = (each.summary for each in ended)
    assert (extracted["ok"], benched["ok"]) == (8, 4)
    assert (read["rows"], read["as_training_cold"]) == (8, None)
    assert (trained["steps"], swept["finished"]) == (2, 2)
    assert asked["answer"]
    (answer,) = read_json_lines(tmp_path / "a.jsonl")
    assert answer["answer"]
    assert doctor["machine"]


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["0.jpg"])
    write_parquet(tmp_path / "set/data.parquet", image=["0.jpg"], caption=["图"])
    data = ("--data", tmp_path / "set/data.parquet", "--vision", MODELS / "vision")
    call("extract", "run", *data, "--out", tmp_path / "features", "--device", "cpu")
    train = ("--features", tmp_path / "features", "--llm", MODELS / "llm", "--max-steps", 1)
    call("train", "run", *train, "--out", tmp_path / "run", "--device", "cpu")
    models = ("--checkpoint", tmp_path / "run/last", "--vision", MODELS / "vision", "--llm", MODELS / "llm")
    for command in (
        ("extract", "run", *data, "--out", tmp_path / "other"),
        ("train", "run", *train, "--out", tmp_path / "other"),
        ("infer", "ask", *models, "--image", tmp_path / "set/0.jpg"),
    ):
        line = call(*command, "--device", "mps", code=1).one_line()
        assert line == "error: --device mps; got no Apple GPU that this torch can use; use --device cpu"
