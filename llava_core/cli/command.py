"""Entry point of every command: parse flags and `-c run.yaml`, run, print `--json`, choose the exit code.

A command is a frozen dataclass (its fields are the flags, their docstrings the help) and a function that
takes it. The function is named by a string and imported only after parsing, so that `--help` is instant.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO

from llava_core import __version__
from llava_core.cli.arguments import parsed
from llava_core.cli.console import guard_terminal, say, show, visible
from llava_core.cli.help import command_page, overview
from llava_core.cli.options import Command
from llava_core.cli.settings import with_settings
from llava_core.cli.translation import LANGUAGES, choose_language, language
from llava_core.errors import MEMORY_ERRORS, LlavaError, first_line, nearest
from llava_core.gpu_drivers import DRIVERS, require_device

INTERRUPTED = 130
HELP = ("-h", "--help")
VERSION = ("-V", "--version")
WIDEST = 100
"""Most columns of a page of help."""
PHASES = ("extract", "train", "infer")
"""Programs that are not commands of another one."""
OUT_OF_MEMORY = "lower --micro-tokens of train, --batch-size of extract or infer batch, --slots of serve"


def main(
    prog: str, description: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> NoReturn:
    """Parse, run, and end the process with an exit code: 0, 1, 2, 3 or INTERRUPTED."""
    guard_terminal()
    for signum in stop_signals():
        if signum != signal.SIGINT:  # which raises by itself
            signal.signal(signum, _interrupt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text in another encoding ends no command
            stream.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _interrupts_kept():
            code = _run(prog, description, commands, argv)
    except LlavaError as error:
        say(error)
        code = error.exit_code
    except KeyboardInterrupt:
        continues = bool(argv) and argv[0] in commands and commands[argv[0]].continues
        say("interrupted; the same command continues where it stopped" if continues else "interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        say(error)
        code = 1
    except RuntimeError as error:
        on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which takes seconds to import
        if not on_gpu and not MEMORY_ERRORS.search(str(error)):
            raise
        memory = "GPU's memory" if on_gpu else "device's memory"
        say(f"error: the {memory} is full; {OUT_OF_MEMORY}; {first_line(error)}")
        code = 1
    sys.exit(code)


def _run(prog: str, description: str, commands: Mapping[str, Command], argv: list[str]) -> int:
    argv = _in_language(argv)
    columns = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    if not argv or argv[0] in HELP:
        show(overview(prog, description, commands, columns))
        return 0 if argv else 2
    if argv[0] in VERSION:
        show(f"llava-align {__version__}")
        return 0
    name, *words = argv
    if name not in commands:
        known = [*commands, *PHASES, *(f"--{each}" for each in ("help", "lang", "version"))]
        phase = f"it is a program of its own: python -m {' '.join(argv[:2])} …"
        do = phase if name in PHASES else nearest(name, known)
        raise LlavaError(f"{prog} has no command {name}", do=do, exit_code=2)
    command = commands[name]
    if any(word in HELP for word in words):
        show(command_page(prog, name, command, columns))
        return 0
    config = parsed(command, _in_language(with_settings(command, words)))
    config.require_inputs()
    require_device(config.own_device, DRIVERS)
    module, function = command.target.split(":")
    summary: dict[str, Any] = getattr(_imported(module), function)(config) or {}
    code = int(summary.pop("exit_code", 0))
    if config.json:
        show(visible(json.dumps(summary, ensure_ascii=False, default=str)))
    return code


def _in_language(argv: list[str]) -> list[str]:
    """The words without `--lang`, whose language is printed from here on."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--lang=") else [word])]
    while "--lang" in words:
        at = words.index("--lang")
        wanted = words[at + 1] if at + 1 < len(words) else ""
        if wanted not in (*LANGUAGES, "auto"):
            expected = ", ".join((*LANGUAGES, "auto"))
            raise LlavaError("--lang", expected=expected, got=wanted or "nothing", exit_code=2)
        choose_language(wanted)
        del words[at : at + 2]
    if language() == "zh" and not all(map(_has_chinese, (sys.stderr, sys.stdout))):
        choose_language("en")
        say("in English: this output's encoding has no Chinese; PYTHONIOENCODING=utf-8 gives it one")
    return words


def _has_chinese(stream: TextIO) -> bool:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return "中".encode(encoding, "replace") != "?".encode(encoding)


def _imported(module: str) -> types.ModuleType:
    """The module, imported without garbage collection: what it makes lasts as long as the process."""
    if module not in sys.modules and gc.isenabled():
        gc.disable()
        try:
            importlib.import_module(module)
        finally:
            gc.freeze()  # else every later collection goes through it
            gc.enable()
    return importlib.import_module(module)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that stop a command: SIGINT (Ctrl-C), SIGTERM, and SIGHUP, unless ignored (`nohup`)."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Repeat an interrupt that Python drops, since it was raised in a `__del__` or a weakref callback."""
    others = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.main_thread().ident, signal.SIGTERM
            threading.Timer(0.01, signal.pthread_kill, again).start()  # after the callback
        else:
            others(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others
