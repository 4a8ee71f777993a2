"""Running commands of the phases in a subprocess, as a user runs them, and parsing their `--json` summary."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator

from llava_align.command_forks import ENDED
from llava_core.cli.console import show
from llava_core.errors import LlavaError
from llava_core.types import JsonDict

_forking: list[subprocess.Popen[str]] = []
"""The process that commands are forks of, within `imports_shared`."""


@contextlib.contextmanager
def imports_shared() -> Iterator[None]:
    """Within it, commands are forks of one process (`command_forks`), so that their imports are paid once.

    On Linux; on macOS, whose libraries do not survive a fork, each is a process of its own as ever.
    """
    if sys.platform != "linux" or _forking:
        yield
        return
    with _process("llava_align.command_forks", stdin=subprocess.PIPE) as process:
        _forking.append(process)
        try:
            yield
        finally:
            _forking.clear()


def run_command(*arguments: object, echo: bool = True) -> JsonDict:
    """Run `python -m ARGUMENTS --json`; returns its summary. Raises LlavaError if it fails.

    With `echo` the command and its output are printed, else an error message quotes its last line.
    """
    words = [*map(str, arguments), "--json"]
    if echo:
        show(f"\n$ python -m {shlex.join(words)}")
    summary: JsonDict = {}
    last = ended = code = ""
    with contextlib.ExitStack() as stack:
        if _forking:
            (process,) = _forking
            assert process.stdin is not None
            process.stdin.write(json.dumps([not echo, *words]) + "\n")
            process.stdin.flush()
        else:
            errors = None if echo else subprocess.STDOUT
            process = stack.enter_context(_process(*words, stderr=errors))
        for line in process.stdout or ():
            line, ended, code = line.partition(ENDED)
            if line.startswith("{"):  # the summary of --json
                summary = json.loads(line)
            elif echo:
                show(line, end="")
            else:
                last = line.strip() or last
            if ended:
                break
    if returned := int(code) if ended else process.wait():
        what = f"`python -m {words[0]} {words[1]}` ended with exit code {returned}"
        raise LlavaError(what, got=last or None)
    return summary


@contextlib.contextmanager
def _process(*words: str, **streams: int | None) -> Iterator[subprocess.Popen[str]]:
    """`python -m WORDS`, terminated by an error here: it must not outlive this process, and go on writing."""
    command, environment = [sys.executable, "-m", *words], {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = functools.partial(subprocess.Popen[str], command, text=True, env=environment)
    with started(stdout=subprocess.PIPE, **streams) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise
