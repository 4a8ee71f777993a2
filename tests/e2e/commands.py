"""The commands as a user types them: real processes, or their `main` in this one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_core import cli

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


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


def run(*arguments: object, code: int = 0, cwd: Path | None = None, **environment: object) -> Ended:
    """Run to the end; asserts the exit code."""
    process = start(*arguments, cwd=cwd, **environment)
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return Ended(process.returncode, out, err)


def call(*arguments: object, code: int = 0) -> Ended:
    """`run` in this process, which spares it seconds of imports: for whatever no start of one can change."""
    module, *argv = map(str, arguments)
    commands = importlib.import_module(f"{module}.__main__").COMMANDS
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        cli.main(module, "", commands, argv)
    ended = Ended(int(left.value.code or 0), out.getvalue(), err.getvalue())
    assert ended.code == code, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    return ended
