"""Running commands of the phases in a subprocess, as a user runs them, and parsing their `--json` summary."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

from llava_core.cli.console import show
from llava_core.errors import LlavaError
from llava_core.types import JsonDict


def run_command(*arguments: object, echo: bool = True) -> JsonDict:
    """Run `python -m ARGUMENTS --json`; returns its summary. Raises LlavaError if it fails.

    With `echo` the command and its output are printed, else an error message quotes its last line.
    """
    words = [str(argument) for argument in arguments]
    if echo:
        show(f"\n$ python -m {shlex.join([*words, '--json'])}")
    command, environment = [sys.executable, "-m", *words, "--json"], {**os.environ, "PYTHONUNBUFFERED": "1"}
    errors = None if echo else subprocess.STDOUT
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        summary: JsonDict = {}
        last = ""
        try:
            for line in process.stdout:
                if line.startswith("{"):  # the summary of --json
                    summary = json.loads(line)
                elif echo:
                    show(line, end="")
                else:
                    last = line.strip() or last
        except BaseException:  # a child must not outlive this process: it would go on writing
            process.terminate()
            raise
    if process.returncode:
        what = f"`python -m {words[0]} {words[1]}` ended with exit code {process.returncode}"
        raise LlavaError(what, got=last or None)
    return summary
