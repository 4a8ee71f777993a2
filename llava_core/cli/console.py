"""What the person at the terminal sees: log lines, results, progress bars and tables.

Results go to standard output by `show`, everything else to standard error. Hosts, captions, answers and
paths were written by strangers: here alone is decided what of them a terminal gets.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import sys
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control, format (bidi among them), surrogate and line-separating characters."""
JOINERS = "\u200c\u200d"
"""Format characters that Persian and emoji are written with."""


def visible(text: str, keep: str = "") -> str:
    """`text` with control, bidi and other invisible characters as JSON escapes them: ESC is `\\u001b`.

    Those in `keep` stay, such as newlines. JSON means the same afterwards.
    """
    if text.isascii() and text.isprintable():
        return text
    keep += JOINERS
    return "".join(c if c in keep or unicodedata.category(c) not in HIDDEN else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    """As JSON writes it; DEL, too, which JSON may leave as it is."""
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]


def say(text: str, keep: str = "") -> None:
    """Print one log line without tearing a progress bar that is being drawn; see `visible` for `keep`."""
    _outliving(lambda: tqdm.write(visible(text, keep), file=sys.stderr))


def say_fault(error: BaseException) -> None:
    """The traceback of an error that nobody foresaw and that ends nothing."""
    say("".join(traceback.format_exception(error)).rstrip(), keep="\n")


def show(text: object = "", end: str = "\n") -> None:
    """Print a result, at once. A terminal gets newlines and tabs, but no other control characters; a pipe or
    a file gets the exact text."""
    shown = visible(str(text), keep="\n\t") if sys.stdout.isatty() else str(text)
    _outliving(lambda: print(shown, end=end, flush=True))


def _outliving(write: Callable[[], None]) -> None:
    """Write; if the terminal has gone, which is no reason to lose the work, write to nothing from then on."""
    try:
        write()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_terminal()


def leave_terminal() -> None:
    """Point standard output and error at nothing where they lead to a terminal that has gone."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Record(logging.LogRecord):
    """What a library logs, visibly."""

    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def _fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(visible(text, keep="\n"), end="", file=sys.__stderr__)


def guard_terminal() -> None:
    """Let libraries' log messages, and the traceback of a fault of ours, go through `visible`, too."""
    logging.setLogRecordFactory(_Record)
    sys.excepthook = _fault


def silence() -> None:
    """Say nothing more in this process, for another says the same; faults of ours keep their traceback."""
    sys.stdout = sys.stderr = open(os.devnull, "w")


def speak() -> None:
    """The end of `silence`: no other will say it."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, whose cells show standard error as it comes."""
    return "ipykernel.zmqshell" in sys.modules


def progress(
    total: int | None, unit: str, initial: int = 0, desc: str | None = None, leave: bool = True
) -> tqdm[Any]:
    """A bar with rate and ETA on standard error; silent when that is neither a terminal nor a notebook."""
    return tqdm(
        total=total,
        unit=f" {unit}",
        initial=initial,
        desc=None if desc is None else visible(desc),
        leave=leave,
        dynamic_ncols=True,
        disable=not (sys.stderr.isatty() or in_notebook()),
        file=sys.stderr,
        smoothing=0.1,
    )


def width(text: str) -> int:
    """Columns that `text` takes in a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Rows as aligned text columns, the first column to the left and the others to the right.

    A cell is one line: a newline in it is visible, too.
    """
    cells = [[visible(str(c)) for c in row] for row in ([header] if header else []) + list(rows)]
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
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def counted(n: int, noun: str) -> str:
    """1, 'source' -> '1 source'; 2000 -> '2,000 sources'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def human_seconds(seconds: float) -> str:
    """90 -> '1.5 min'."""
    for unit, length in (("s", 60), ("min", 60), ("h", 48)):
        if seconds < length:
            return f"{seconds:.3g} {unit}"
        seconds /= 60 if unit != "h" else 24
    return f"{seconds:.1f} days"
