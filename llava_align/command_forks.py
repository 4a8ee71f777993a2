"""`python -m llava_align.command_forks`: commands as forks of one process that has imported what they import.

Reads a command a line from standard input, as JSON: whether its errors go to standard output, then the words
after `python -m`. After a command's output comes ENDED and its exit code. The process itself starts no thread
and initialises no GPU, since a fork could use neither.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

IMPORTED = ("extract.run", "train.run", "train.evaluate", "infer.ask", "infer.batch.command")
ENDED = "\0ended "
"""No command prints a NUL."""


def next_command(at_interrupt: Any) -> list[str]:
    """The words of a command, in a fork that is to run it; at the end of the input the process ends."""
    for line in open(0, closefd=False):  # sys.stdin stays unread, for the forks
        request: list[Any] = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is known whom to end
        child = os.fork()
        if child:
            signal.signal(signal.SIGTERM, functools.partial(_forward, child))
        else:
            signal.signal(signal.SIGINT, at_interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        if not child:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if request[0]:
                os.dup2(1, 2)
            return request[1:]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            os.write(1, f"{ENDED}{code}\n".encode())
        except BrokenPipeError:  # who asked has gone
            break
    sys.exit()


def _forward(child: int, signum: int, frame: object) -> None:
    os.kill(child, signum)


def main() -> None:
    at_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches a fork by itself
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy these pages
    gc.enable()
    module, *sys.argv[1:] = next_command(at_interrupt)
    if sys.modules["torch"].cuda._is_in_bad_fork():  # an import has initialised CUDA after all
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
