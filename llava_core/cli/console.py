"""Output to the terminal: log lines, results, progress bars and text tables.

Results go to standard output by `show`, everything else to standard error. Hosts, captions, answers and paths
are untrusted: this module alone escapes their control characters.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import stat
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from llava_core.cli.translation import error_line, translated, translated_label

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control, format (bidi among them), surrogate and line-separating characters."""
JOINERS = "\u200c\u200d"
"""Format characters that Persian and emoji need."""


def visible(text: str, keep: str = "") -> str:
    """`text` with control, bidi and other invisible characters escaped as in JSON: ESC is `\\u001b`.

    Characters in `keep`, such as newlines, stay. A JSON text keeps its meaning.
    """
    if text.isascii() and text.isprintable():
        return text
    keep += JOINERS
    return "".join(c if c in keep or unicodedata.category(c) not in HIDDEN else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """JSON's escape of a character; of DEL, too, which JSON need not escape."""
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]


def say(text: str | Exception, keep: str = "") -> None:
    """Print one log line or error, translated, without tearing a progress bar; see `visible` for `keep`."""
    line = error_line(text) if isinstance(text, Exception) else translated(text)
    _outliving(lambda: tqdm.write(visible(line, keep), file=sys.stderr))


@functools.cache
def say_once(text: str) -> None:
    """`say`, but each text only once in a process."""
    say(text)


def say_fault(error: BaseException) -> None:
    """Print the traceback of an unexpected error that does not end the command."""
    say("".join(traceback.format_exception(error)).rstrip(), keep="\n")


def show(text: object = "", end: str = "\n") -> None:
    """Print a result and flush. Control characters except newlines and tabs are escaped on a terminal; a pipe
    or a file gets the exact text."""
    shown = visible(str(text), keep="\n\t") if sys.stdout.isatty() else str(text)
    _outliving(lambda: print(shown, end=end, flush=True))


def _outliving(write: Callable[[], None]) -> None:
    """Write; if the terminal is gone, discard all further output, so that the work goes on."""
    try:
        write()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_terminal()


def leave_terminal() -> None:
    """Redirect standard output and error to /dev/null where their terminal is gone."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Record(logging.LogRecord):
    """A library's log record, its message escaped by `visible`."""

    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def _fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(visible(text, keep="\n"), end="", file=sys.__stderr__)


def guard_terminal() -> None:
    """Escape control characters in libraries' log messages and in tracebacks as well."""
    logging.setLogRecordFactory(_Record)
    sys.excepthook = _fault


def silence() -> None:
    """Discard this process's output, because another prints the same; tracebacks are still printed."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


def speak() -> None:
    """Undo `silence`."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose cells show standard error as it comes."""
    return "ipykernel.zmqshell" in sys.modules


class ProgressBar(Protocol):
    """What work reports its progress to: a `tqdm` bar, or a stand-in that counts or measures."""

    def update(self, n: int = 1) -> object:
        """Count `n` more finished items."""

    def set_postfix_str(self, text: str, /, refresh: bool = True) -> object:
        """Show a text behind the bar."""


def progress(
    total: int | None, unit: str, initial: int = 0, desc: str | None = None, leave: bool = True
) -> tqdm[Any]:
    """A progress bar with rate and ETA on standard error; hidden unless in a terminal or a notebook."""
    return tqdm(
        total=total,
        unit=f" {unit}",
        initial=initial,
        desc=None if desc is None else visible(translated(desc)),
        leave=leave,
        dynamic_ncols=True,
        disable=not (sys.stderr.isatty() or (leave and in_notebook())),  # a notebook shows nested bars badly
        file=sys.stderr,
        smoothing=0.1,
    )


def width(text: str) -> int:
    """Terminal columns that `text` takes; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Rows as aligned text columns: the first flush left, the others flush right.

    The header is translated; without one, the first column is, which then holds the names of figures. A cell
    is one line: a newline in it is escaped.
    """
    texts = [[str(cell) for cell in row] for row in rows]
    if header:
        texts.insert(0, list(map(translated_label, header)))
    else:
        texts = [[translated_label(row[0]), *row[1:]] for row in texts]
    cells = [[visible(cell) for cell in row] for row in texts]
    if not cells:
        return ""
    widths = [max(width(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    lines = []
    for row in cells:
        padded = [
            cell + " " * (widths[i] - width(cell)) if i == 0 else " " * (widths[i] - width(cell)) + cell
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(padded).rstrip())
    if header:
        lines.insert(1, "-" * max(width(line) for line in lines))
    return "\n".join(lines)


def human_bytes(n: float) -> str:
    """Bytes as text: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def human_operations(n: float) -> str:
    """Floating-point operations as text: 2.1e15 -> '2.1 PFLOP'."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if n < 1000:
            return f"{n:.3g} {unit}FLOP"
        n /= 1000
    return f"{n:,.3g} EFLOP"


def counted(n: int, noun: str) -> str:
    """Number and noun, translated: 1 -> '1 source', 2000 -> '2,000 sources'."""
    return translated(f"{n:,} {noun}{'' if n == 1 else 's'}")


def human_seconds(seconds: float) -> str:
    """Seconds as text: 90 -> '1.5 min'."""
    for unit, length in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= 60 if unit != "h" else 24
    return f"{seconds:.1f} days"
