"""The one exception whose message is meant for the person at the terminal."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path


class LlavaError(Exception):
    """A fault the user can mend, said in one line: what, what was expected, what came, what to do.

    `exit_code` is the status the command ends with: 1 failed, 2 wrong usage, 3 too many failed rows.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        do: str | None = None,
        exit_code: int = 1,
    ) -> None:
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if do is not None:
            parts.append(do)
        super().__init__("; ".join(parts).replace("\n", " "))
        self.exit_code = exit_code


def nearest(name: str, known: Sequence[str]) -> str:
    """What to say to whoever typed a name that is none of `known`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def require_folder(out: Path) -> None:
    """Raise LlavaError (wrong usage) if --out, there or not, cannot be a folder that is written to."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise LlavaError("--out", expected="a folder", got=f"the file {there}", exit_code=2)
    if not os.access(there, os.W_OK):
        raise LlavaError("--out", expected="a folder that can be written to", got=there, exit_code=2)


def first_line(error: BaseException) -> str:
    """What a library's error says, without the paragraphs that follow."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def reason(error: BaseException) -> str:
    """What was wrong at the bottom of it: requests tells the whole story of a failed connection."""
    text = first_line(error)
    return re.sub(r"['\"]\)+$", "", text.rsplit(": ", 1)[-1]) if "(Caused by " in text else text
