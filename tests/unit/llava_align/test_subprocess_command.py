"""Commands in processes of their own, and as forks of one that has imported what they import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llava_align.subprocess_command import imports_shared, run_command
from llava_core.cli.translation import CHOSEN, choose_language
from llava_core.errors import LlavaError
from llava_core.types import JsonDict
from tests.support.paths import ROOT

TELLS = """
import json, os, signal, sys
told = {name: repr(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGPIPE")}
told |= {"argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "name": __name__}
told["main"] = sys.modules["__main__"].told is told
told |= {"there": os.environ["THERE"], "encoding": sys.stdout.encoding}
told["mask"] = len(signal.pthread_sigmask(signal.SIG_BLOCK, []))
told["read"] = sys.stdin.read() if "--read" in sys.argv else ""
print("no newline", end="")
print()
print(json.dumps({"told": told, "torch": "torch" in sys.modules, "pid": os.getpid()}))
print("after it", end="")
"""
ENDS = """
import os, sys
match sys.argv[1]:
    case "exits": sys.exit(3)
    case "raises": raise OSError("no such thing")
    case "dies": print("on its way", flush=True); os.kill(os.getpid(), 9)
"""
STOPS = """
import signal, sys, time
def stop(signum, frame):
    open(sys.argv[1], "w").write("kept")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
while True:  # until stopped, or nobody reads
    print("ready")
    time.sleep(0.05)
"""
ASKS = """
import signal, sys
from llava_align.subprocess_command import imports_shared, run_command
signal.signal(signal.SIGTERM, signal.default_int_handler)
with imports_shared():
    run_command("stops", sys.argv[1])
"""


def test_a_command_speaks_the_language_of_the_one_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, "en")  # which is restored afterwards
    choose_language("zh")
    with pytest.raises(LlavaError, match="错误：python -m train 没有命令 runn"):
        run_command("train", "runn", echo=False)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that `python -m` finds."""
    for name, code in (("tells", TELLS), ("ends", ENDS), ("stops", STOPS)):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(tmp_path))))
    monkeypatch.setenv("THERE", "yes")
    return tmp_path


def test_a_fork_is_as_a_process_of_its_own(modules: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def told() -> tuple[JsonDict, str]:
        summary = run_command("tells", "--flag", "图", echo=True)
        return summary, capfd.readouterr().out

    def ended(how: str) -> str:
        with pytest.raises(LlavaError) as failed:
            run_command("ends", how, echo=False)
        return str(failed.value)

    def all_of_them() -> tuple[list[tuple[JsonDict, str]], list[str]]:
        return [told(), told()], [ended(how) for how in ("exits", "raises", "dies")]

    alone, alone_ended = all_of_them()
    with imports_shared():
        forked, forked_ended = all_of_them()
        assert run_command("tells", "--read")["told"]["read"] == ""
    again, _ = told()
    assert [(summary["told"], out) for summary, out in forked] == [
        (summary["told"], out) for summary, out in alone
    ]
    assert forked_ended == alone_ended
    assert "exit code 3" in forked_ended[0]
    assert forked_ended[1].endswith("exit code 1; got OSError: no such thing")
    assert forked_ended[2].endswith("exit code -9; got on its way")
    assert [summary["torch"] for summary, _ in forked] == [sys.platform == "linux"] * 2
    assert forked[0][0]["pid"] != forked[1][0]["pid"]
    assert not again["torch"]


def asking(kept: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(kept)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    return process


def test_a_stopped_process_stops_its_fork_which_keeps_its_work(modules: Path) -> None:
    process = asking(modules / "kept")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # which the fork holds open
    assert (modules / "kept").read_text() == "kept"


@pytest.mark.parametrize("everyone", [True, False])
def test_nothing_outlives_ctrl_c_nor_a_kill(modules: Path, everyone: bool) -> None:
    process = asking(modules / "kept")
    if everyone:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    process.communicate(timeout=60)
