"""`python -m benchmarks.gpu`: the whole script on a CPU, with small models; what fails is a row."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import NEEDED, SECTIONS
from benchmarks.gpu.tables import MOST_CHARACTERS, shortened
from llava_core.filesystem import read_json_lines
from tests.support.commands import run, started, wait_until
from tests.support.paths import ROOT


def test_every_section_measures(tmp_path: Path) -> None:
    ended = run("benchmarks.gpu", "--out", tmp_path, "--shape", "small", "--budget", 3000)
    rows = read_json_lines(tmp_path / "gpu.jsonl")
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    assert not [row for row in rows if row["unit"] == "failed"]
    figures = {row["name"]: row["value"] for row in rows if isinstance(row["value"], float)}
    assert (
        min(value for name, value in figures.items() if "distance" not in name and "furthest" not in name) > 0
    )
    assert {
        "(a) course, HTTP",
        "(d) ours",
        "llm: (d) ours",
        "lora: (a) course, HTTP",
        "ours, batch 2",
        "2 runs together",
    } <= figures.keys()
    for section in SECTIONS:
        assert f"**{section}**" in ended.out
    assert len(ended.out) <= MOST_CHARACTERS


def test_what_fails_is_a_row_and_the_next_section_runs(tmp_path: Path) -> None:
    """Here the process is gone in one section; before, a package that everything needs was not there."""
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/sitecustomize.py").write_text(
        "import os, sys\nif 'benchmarks.gpu.worker' in ' '.join(sys.orig_argv):\n"
        "    import benchmarks.gpu.machine as m\n    m.ceilings = lambda *_: os._exit(7)\n"
    )
    where = f"{tmp_path / 'gone'}:{ROOT}"
    flags = ("--shape", "small", "--budget", 3000, "--only", "ceilings", "tokens")
    run("benchmarks.gpu", "--out", tmp_path / "out", *flags, code=1, PYTHONPATH=where)
    rows = read_json_lines(tmp_path / "out/gpu.jsonl")
    (failed,) = (row for row in rows if row["unit"] == "failed")
    assert (failed["section"], failed["value"]) == (
        "ceilings",
        "its process ended (exit code 7); see gpu.log",
    )
    assert [row["section"] for row in rows if row["section"] not in NEEDED][1:] == ["tokens", "tokens"]
    assert "| failed | its process ended" in (tmp_path / "out/gpu.md").read_text()

    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/__init__.py").write_text("raise ModuleNotFoundError(name='yaml')")
    run("benchmarks.gpu", "--out", tmp_path / "bare", *flags, code=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    last = json.loads((tmp_path / "bare/gpu.jsonl").read_text().splitlines()[-2])
    assert (last["section"], last["name"], last["value"]) == ("imports", "cannot be imported", "yaml")


def test_its_worker_does_not_outlive_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, time\nif 'benchmarks.gpu.worker' in ' '.join(sys.orig_argv):\n"
        f"    open({str(tmp_path / 'worker')!r}, 'w').write(f'{{os.getpid()}} ')\n    time.sleep(200)\n"
    )
    flags = ("--out", tmp_path / "out", "--shape", "small", "--only", "ceilings")
    with started("benchmarks.gpu", *flags, PYTHONPATH=f"{tmp_path}:{ROOT}") as process:
        told = tmp_path / "worker"
        worker = wait_until(process, lambda: told.exists() and told.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)


def test_a_budget_and_a_folder_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    for budget in (0, "nan", 2):
        ended = run("benchmarks.gpu", "--out", tmp_path / "out", "--budget", budget, code=2)
        assert "--budget is too small: at least 3 seconds" in ended.err
    (tmp_path / "file").write_text("")
    ended = run("benchmarks.gpu", "--out", tmp_path / "file", code=2)
    assert "file: File exists" in ended.err


def test_tables_that_are_too_long_say_so() -> None:
    text = "\n".join(["| a row |"] * 3000)
    assert shortened("a") == "a"
    assert len(shortened(text)) <= MOST_CHARACTERS
    assert shortened(text).endswith(f"… {len(text):,} characters in all: the rest is in gpu.md")
