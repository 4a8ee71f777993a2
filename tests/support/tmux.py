"""A real terminal without a window: keys in, screen out."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.commands import ENVIRONMENT
from tests.support.paths import ROOT


class Tmux:
    """One command in a terminal of 100 columns and 50 lines."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", os.devnull]

    def run(self, *arguments: str) -> str:
        ended = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, timeout=20)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names, such as Enter, M-Enter, C-c, Up."""
        self.run("send-keys", *names)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)

    def enter(self, text: str) -> None:
        self.type(text)
        self.keys("Enter")

    def screen(self, colours: bool = False) -> str:
        """Everything shown so far, what has scrolled away too."""
        return self.run("capture-pane", "-p", "-J", "-S", "-", *(["-e"] if colours else []))

    def until(self, text: str, times: int = 1) -> str:
        """The screen once it shows `text` so often."""
        return self._until(lambda: self.screen().count(text) >= times, f"{text!r} never came")

    def until_it_matches(self, pattern: str) -> str:
        """The screen once some lines of it match a regular expression."""
        found = re.compile(pattern, re.MULTILINE)
        return self._until(lambda: found.search(self.screen()) is not None, f"{pattern!r} never came")

    def gone(self) -> None:
        """Wait for the end of the command."""
        self._until(lambda: self.run("display", "-p", "#{pane_dead}").strip() == "1", "it goes on")

    def _until(self, true: Callable[[], bool], complaint: str) -> str:
        deadline = time.monotonic() + 90
        while not true():
            assert time.monotonic() < deadline, f"{complaint}:\n{self.screen()}"
            time.sleep(0.05)
        return self.screen()


@contextlib.contextmanager
def terminal(command: Sequence[object], socket: Path, **environment: str) -> Iterator[Tmux]:
    """Run `command` in a terminal of true colour. Skips the test where there is no tmux."""
    if not shutil.which("tmux"):
        pytest.skip("no tmux here; scripts/setup.sh test installs it where it may")
    tmux = Tmux(socket)
    # Workers of pytest-xdist set the size of a terminal that they do not have.
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES")}
    variables = {**ours, "COLORTERM": "truecolor", "LC_ALL": "C.UTF-8", **environment}
    words = shlex.join(["env", *(f"{k}={v}" for k, v in environment.items()), *map(str, command)])
    start = [*tmux._tmux, "-u", "new-session", "-d", "-x", "100", "-y", "50", "-c", str(ROOT), words]
    started = [";", "set", "-g", "remain-on-exit", "on"]
    subprocess.run([*start, *started], env=variables, check=True, timeout=20)
    try:
        yield tmux
    finally:
        subprocess.run([*tmux._tmux, "kill-server"], capture_output=True, timeout=20)
