"""How a command begins and ends, whatever it does."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_core
from llava_core.cli import command as cli
from llava_core.cli import options
from llava_core.cli.options import Command, Options
from llava_core.errors import LlavaError, first_line, reason
from tests.support.commands import run
from tests.support.paths import ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(Options):
    """A command for tests."""

    rate: float = 0.5
    """A number."""
    names: tuple[str, ...] = ()
    """Some words."""
    fail: str = ""
    """How to end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeated(Options):
    """A command with a flag that is given again and again."""

    name: options.Repeated
    """A word."""


def repeated(flags: Repeated) -> dict[str, Any]:
    return {"name": flags.name}


class LetsNothingOut:
    """As of a weak reference's callback, Python drops what is raised here."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def target(flags: Flags) -> dict[str, Any]:
    endings: dict[str, BaseException] = {
        "mistake": LlavaError("what", expected="this", got="that", do="do so"),
        "usage": LlavaError("wrong usage", exit_code=2),
        "interrupt": KeyboardInterrupt(),
        "disk": OSError(28, "No space left on device", "x.h5"),
        "memory": torch.OutOfMemoryError("CUDA out of memory.\nTry this."),
        "RAM": RuntimeError("DefaultCPUAllocator: no\nmore"),
    }
    if flags.fail == "many":
        return {"exit_code": 3}
    if flags.fail == "hang up":
        signal.raise_signal(signal.SIGHUP)
        time.sleep(60)
    if flags.fail == "dropped interrupt":
        LetsNothingOut()
        time.sleep(60)
    if flags.fail:
        raise endings[flags.fail]
    return {"rate": flags.rate, "names": flags.names}


RECIPES: dict[str, dict[str, Any]] = {"calm": {"rate": 0.1, "names": ["tea", "cake"]}, "wild": {"rate": 9.0}}
COMMANDS = {
    "go": Command(Flags, f"{__name__}:target", RECIPES, continues=True),
    "other": Command(Flags, f"{__name__}:target"),
}


def ended(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main("tool", "A tool.", COMMANDS, ["go", *argv])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("ending", "code", "line"),
    [
        ("mistake", 1, "error: what; expected this; got that; do so\n"),
        ("usage", 2, "error: wrong usage\n"),
        ("interrupt", 130, "interrupted; the same command continues where it stopped\n"),
        ("hang up", 130, "interrupted; the same command continues where it stopped\n"),
        ("dropped interrupt", 130, "interrupted; the same command continues where it stopped\n"),
        ("disk", 1, "error: No space left on device: x.h5\n"),
        ("memory", 1, f"error: the GPU's memory is full; {cli.OUT_OF_MEMORY}; CUDA out of memory.\n"),
        ("RAM", 1, f"error: the device's memory is full; {cli.OUT_OF_MEMORY}; DefaultCPUAllocator: no\n"),
        ("many", 3, ""),
    ],
)
def test_endings(ending: str, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--fail", ending) == code
    assert capsys.readouterr().err == line


def test_nohup_is_nohup(tmp_path: Path) -> None:
    """Who has SIGHUP ignored from the start, goes on."""
    code = (
        "import signal; from llava_core.cli.command import main, stop_signals\n"
        "from llava_core.cli.options import Command, Options\n"
        "def target(options):\n"
        "    signal.raise_signal(signal.SIGHUP)\n"
        "    return {'signals': [s.name for s in stop_signals()]}\n"
        "main('tool', '', {'go': Command(Options, '__main__:target')}, ['go', '--json'])"
    )
    command = ["nohup", sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    assert (ended.returncode, json.loads(ended.stdout)["signals"]) == (0, ["SIGINT", "SIGTERM"]), ended.stderr


TALKER = """
import fcntl, sys, termios, time
from llava_core.cli.command import main
from llava_core.cli.options import Command, Options
from llava_core.cli.console import say, show

def target(options):
    try:
        say("ready")
        for _ in range(600):  # a signal just before a sleep begins is seen when that ends
            time.sleep(0.1)
    finally:
        say("stopping")
        show("a table")
        open(sys.argv[1], "w").write("kept")

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main("tool", "", {"go": Command(Options, "__main__:target")}, ["go"])
"""


def test_the_end_of_its_terminal_stops_a_command_that_then_keeps_its_work(tmp_path: Path) -> None:
    """Every write to a terminal that has gone fails, and nothing may be lost over that."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TALKER, str(tmp_path / "work")]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True
    )
    os.close(theirs)
    said = b""
    while b"ready" not in said:
        said += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(60) == 130
    assert (tmp_path / "work").read_text() == "kept"


def test_what_does_not_continue_does_not_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main("tool", "A tool.", COMMANDS, ["other", "--fail", "interrupt"])
    assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("story", "bottom"),
    [
        (
            "HTTPSConnectionPool(host='h', port=443): Max retries exceeded with url: /x (Caused by "
            "NameResolutionError(\"HTTPSConnection(host='h', port=443): Failed to resolve 'h' "
            '([Errno -2] Name or service not known)"))',
            "Failed to resolve 'h' ([Errno -2] Name or service not known)",
        ),
        (
            "HTTPConnectionPool(host='h', port=9): Max retries exceeded with url: /x (Caused by "
            "NewConnectionError('<HTTPConnection at 0x1>: Failed to establish a new connection: "
            "[Errno 111] Connection refused'))",
            "[Errno 111] Connection refused",
        ),
        ("not whole: 3 bytes (of 4)", "not whole: 3 bytes (of 4)"),
    ],
)
def test_the_reason_at_the_bottom_is_whole(story: str, bottom: str) -> None:
    assert reason(OSError(story)) == bottom


@pytest.mark.parametrize(
    ("story", "line"),
    [
        ("cut short\n\nand so on", "cut short"),
        ("instantiate one of: \n(1) a tokenizer, \n(2) a slow one", "instantiate one of: (1) a tokenizer"),
        ("nothing follows:\n", "nothing follows"),
        ("\n", "OSError"),
    ],
)
def test_a_librarys_line_does_not_end_in_a_colon(story: str, line: str) -> None:
    assert first_line(OSError(story)) == line


def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("--json", "--rate", "1e-3", "--names", "a", "b") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rate": 0.001, "names": ["a", "b"]}


def test_what_a_file_of_settings_says_is_taken_as_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """YAML 1.1 reads 010 as eight, 1:30 as ninety and yes as true."""
    path = tmp_path / "run.yaml"
    path.write_text("rate: 010\nnames: [1:30, yes, 2024-01-01T00:00:00Z, 1_000]\n")
    assert ended("-c", str(path), "--json") == 0
    names = ["1:30", "yes", "2024-01-01T00:00:00Z", "1_000"]
    assert json.loads(capsys.readouterr().out) == {"rate": 10.0, "names": names}
    path.write_text("\ufefffail: --x\nrate: 1:30\n")
    assert ended("-c", str(path)) == 2
    assert "error: --rate; expected a number; got 1:30\n" in capsys.readouterr().err


def test_a_file_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rate: 1e-3\nnames: [x, y]\njson: true\n")
    assert ended("-c", str(path), "--names", "typed") == 0
    assert json.loads(capsys.readouterr().out) == {"rate": 0.001, "names": ["typed"]}
    for text, message in (
        ("rat: 1\n", "unknown key 'rat'"),
        ("- a\n", "holds no settings; expected key: value lines; got a list"),
        ("", "holds no settings; expected key: value lines; got nothing"),
        ("a: [\n", "cannot read settings"),
        ("rate: 1\n---\nrate: 2\n", "found another document in line 2"),
        ("rate: " + "[" * 3000, "cannot read settings"),
        ("rate: {a: 1}\n", "a value in line 1 of"),
        ("names: &x [*x]\n", "a number, a text, or a list of them; got !!seq"),
        ("names: [a, null]\n", "got !!null"),
        ("names: !!binary aGVsbG8=\n", "got !!binary"),
        ("names: !!python/object/apply:os.system [ls]\n", "got !!python/object/apply:os.system"),
        ('fail: "a\\0b"\n', "got 'a\\x00b'"),
        ('fail: "\\ud800"\n', "got '\\ud800'"),
        ("rate: [1, 2]\n", "expected one value; got a list of 2"),
        ("json: 3\n", "--json; expected true or false; got 3"),
        ("[a]: 3\n", "no key in line 1"),
        ("null: 3\n", "unknown key 'null'"),
    ):
        path.write_text(text)
        assert ended("-c", str(path)) == 2
        assert message in capsys.readouterr().err
    assert ended("-c", str(tmp_path / "none.yaml")) == 2
    assert ended("-c") == 2


def test_a_flag_given_again_is_a_list_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = {"go": Command(Repeated, f"{__name__}:repeated"), "other": COMMANDS["other"]}
    path = tmp_path / "run.yaml"
    for words, names in (
        (["--name", "a", "--name", "-"], ["a", "-"]),
        (["-c", str(path)], ["x", "y z"]),
        (["-c", str(path), "--name", "typed"], ["typed"]),
    ):
        path.write_text("name: [x, y z]\n")
        with pytest.raises(SystemExit) as caught:
            cli.main("tool", "A tool.", commands, ["go", "--json", *words])
        assert caught.value.code == 0
        assert json.loads(capsys.readouterr().out) == {"name": names}


def test_a_recipe_yields_to_a_file_and_both_to_what_is_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def summary(*argv: str) -> dict[str, Any]:
        assert ended("--json", *argv) == 0
        figures: dict[str, Any] = json.loads(capsys.readouterr().out)
        return figures

    assert summary("--recipe", "calm") == {"rate": 0.1, "names": ["tea", "cake"]}
    assert summary("--recipe=wild") == {"rate": 9.0, "names": []}
    path = tmp_path / "run.yaml"
    path.write_text("rate: 0.2\n")
    assert summary("-c", str(path), "--recipe", "calm") == {"rate": 0.2, "names": ["tea", "cake"]}
    assert summary("--recipe", "calm", "-c", str(path), "--rate", "0.3", "--names", "x") == {
        "rate": 0.3,
        "names": ["x"],
    }
    path.write_text("rate: 0.3\nrecipe: calm\n")
    assert summary("-c", str(path)) == {"rate": 0.3, "names": ["tea", "cake"]}
    assert summary("-c", str(path), "--recipe", "wild") == {"rate": 0.3, "names": []}
    assert ended("--recipe", "none") == 2
    assert "unknown --recipe 'none'; expected calm, wild" in capsys.readouterr().err
    assert ended("--recipe") == 2
    with pytest.raises(SystemExit) as caught:  # a command without recipes knows no such flag
        cli.main("tool", "A tool.", COMMANDS, ["other", "--recipe", "calm"])
    assert caught.value.code == 2


def test_unknown_flags_are_wrong_usage() -> None:
    assert ended("--no-such-flag") == 2
    assert ended("--rate", "much") == 2


def test_a_phase_is_no_command_of_another_program() -> None:
    line = run("llava_align", "extract", "run", "--data", "x", code=2).one_line()
    do = "it is a program of its own: python -m extract run …"
    assert line == f"error: llava has no command extract; {do}"
    assert "python -m extract" in run("llava_align", "--help").out
    line = run("llava_align", "extrct", code=2).one_line()
    assert line == "error: llava has no command extrct; did you mean 'extract'?"


def test_a_program_tells_its_version() -> None:
    for module in ("extract", "train", "infer", "llava_align"):
        assert run(module, "--version").out == f"llava-align {llava_core.__version__}\n"


@pytest.mark.parametrize(
    ("module", "commands"),
    [
        ("extract", ["run", "retry-failed", "verify", "inspect"]),
        ("train", ["run", "sweep", "plan", "eval", "watch"]),
        ("infer", ["ask", "chat", "batch"]),
        ("llava_align", ["demo", "trace", "match", "chat-llm"]),
    ],
)
def test_help_of_every_command(module: str, commands: list[str]) -> None:
    overview = run(module, "--help").out
    for command in commands:
        assert command in overview
    assert "--json" in run(module, commands[0], "--help").out


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("extract.inspect.command", {"torch", "aiohttp"}),
        ("extract.run", {"transformers"}),
        ("train.watch.command", {"torch", "numpy", "aiohttp"}),
        ("llava_align.demo.command", {"torch"}),
        ("llava_align.demo.contact_sheet", {"torch"}),
    ],
)
def test_a_command_imports_only_what_it_needs(module: str, without: set[str]) -> None:
    code = f"import {module}, sys; print({without} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "set()\n"


COLLECTED = """
import gc
from llava_core.cli.command import main
from llava_core.cli.options import Command, Options
started = []
gc.callbacks.append(lambda phase, info: started.append(phase))
main("tool", "", {"go": Command(Options, "imported:target")}, ["go", "--json"])
"""


def test_what_a_command_imports_is_not_searched_for_garbage(tmp_path: Path) -> None:
    """Which takes a sixth of the time that importing torch and transformers takes."""
    (tmp_path / "imported.py").write_text(
        "import gc, __main__; began = len(__main__.started)\n"
        "kept = [[] for _ in range(100_000)]\n"
        "paused = len(__main__.started) == began\n"
        "def target(options):\n"
        "    return {'paused': paused, 'frozen': gc.get_freeze_count() > 100_000, 'on': gc.isenabled()}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-c", COLLECTED]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert json.loads(ended.stdout) == {"paused": True, "frozen": True, "on": True}


@pytest.mark.parametrize("module", ["extract", "train", "infer", "llava_align"])
def test_help_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "h5py", "PIL", "numpy", "aiohttp", "asyncio"}
    code = f"import {module}.__main__, sys; print({heavy} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "set()\n"


def test_a_list_typed_twice_is_refused_and_of_one_value_the_last_wins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended("--names", "a", "--names", "b") == 2
    assert capsys.readouterr().err == "error: --names is given twice; give it once, with all its values\n"
    assert ended("--rate", "1", "--rate", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rate"] == 2
