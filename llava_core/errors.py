"""The one exception whose message is meant for the person at the terminal."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Sequence

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of an OSError: the disk takes nothing more, from nobody."""


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


def first_line(error: BaseException) -> str:
    """What a library's error says, without the paragraphs that follow; after a colon, with the next line."""
    first, *rest = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return " ".join([first, *rest[: first.endswith(":")]]).rstrip(",:") or type(error).__name__


def reason(error: BaseException) -> str:
    """What was wrong at the bottom of it: requests tells the whole story of a failed connection."""
    text = first_line(error)
    return re.sub(r"['\"]\)+$", "", text.rsplit(": ", 1)[-1]) if "(Caused by " in text else text
