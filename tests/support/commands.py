"""The commands as a user types them: real processes, or their `main` in this one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llava_core.cli import command as cli
from tests.support.paths import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """What --json prints on the last line of standard output."""
        summary: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return summary

    def one_line(self) -> str:
        """The error's single line; asserts that there is one, the last, and no traceback."""
        assert "Traceback" not in self.err, self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert self.err.splitlines()[-1] == errors[0]
        return errors[0]


def start(*arguments: object, cwd: Path | None = None, **environment: object) -> subprocess.Popen[str]:
    """`python -m extract run ...` in its own process group, with these variables besides ours."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**ENVIRONMENT, **{name: str(value) for name, value in environment.items()}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@contextlib.contextmanager
def started(
    *arguments: object, cwd: Path | None = None, **environment: object
) -> Iterator[subprocess.Popen[str]]:
    """`start` for a `with` block, which the process does not outlive, whatever happens."""
    with start(*arguments, cwd=cwd, **environment) as process:
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """With what it has started; it may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_until(process: subprocess.Popen[str], condition: Callable[[], T], seconds: float = 200) -> T:
    """What the condition gives once it is true; asserts that the process lives until then, in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if (code := process.poll()) is not None or time.monotonic() > deadline:
            _kill(process)
            raise AssertionError(f"exit code {code}\n{process.communicate(timeout=60)[1]}")
        time.sleep(0.01)
    return found


def holder(lock: Path) -> int | None:
    """The number of the process that holds a lock, once it says so."""
    with contextlib.suppress(FileNotFoundError):
        if found := re.match(r"by process (\d+) on ", lock.read_text()):
            return int(found[1])
    return None


def run(*arguments: object, code: int = 0, cwd: Path | None = None, **environment: object) -> Ended:
    """Run to the end; asserts the exit code."""
    with started(*arguments, cwd=cwd, **environment) as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return Ended(process.returncode, out, err)


def run_each(commands: Sequence[Sequence[object]], **environment: Any) -> list[Ended]:
    """`run` of several commands, each with exit code 0, one after the other in one process."""
    listed = json.dumps([list(map(str, command)) for command in commands])
    ended = run("tests.support.commands", listed, **environment)
    return [Ended(0, *printed) for printed in json.loads(ended.out)]


class Screen(io.StringIO):
    """Standard output that leads to a terminal."""

    def isatty(self) -> bool:
        return True


def fill(disk: Path) -> Path:
    """Write a file until the disk is full; returns the file."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    return filler


def call(*arguments: object, code: int = 0, pipe: bool = True) -> Ended:
    """`run` in this process, which spares it seconds of imports: for whatever no start of one can change."""
    module, *argv = map(str, arguments)
    commands = importlib.import_module(f"{module}.__main__").COMMANDS
    with (
        contextlib.redirect_stdout(io.StringIO() if pipe else Screen()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        cli.main(module, "", commands, argv)
    ended = Ended(int(left.value.code or 0), out.getvalue(), err.getvalue())
    assert ended.code == code, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    return ended


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of more bytes cannot be written, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


if __name__ == "__main__":  # see `run_each`
    print(json.dumps([dataclasses.astuple(call(*command))[1:] for command in json.loads(sys.argv[1])]))
