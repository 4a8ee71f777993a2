"""What the person at the terminal sees: log lines, progress bars and tables.

Results go to standard output; everything here but `table` goes to standard error.
"""

from __future__ import annotations

import os
import sys
import traceback
import unicodedata
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
    """Print one log line without tearing a progress bar that is being drawn."""
    tqdm.write(line, file=sys.stderr)


def silence() -> None:
    """Say nothing more in this process, for another says the same; faults of ours keep their traceback."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def progress(
    total: int | None, unit: str, initial: int = 0, desc: str | None = None, leave: bool = True
) -> tqdm[Any]:
    """A bar with rate and ETA on standard error; silent when that is not a terminal."""
    return tqdm(
        total=total,
        unit=f" {unit}",
        initial=initial,
        desc=desc,
        leave=leave,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty(),
        file=sys.stderr,
        smoothing=0.1,
    )


def width(text: str) -> int:
    """Columns that `text` takes in a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] | None = None) -> str:
    """Rows as aligned text columns, the first column to the left and the others to the right."""
    cells = [[str(c) for c in row] for row in ([header] if header else []) + list(rows)]
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
