"""LlavaError, the exception whose message is meant for the user, and helpers to word such messages."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator, Sequence

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Numbers of an OSError that mean the disk is full or read-only."""
MEMORY_ERRORS = re.compile(r"DefaultCPUAllocator: |MPS backend out of memory")
"""What torch says of a CPU's or an Apple GPU's memory, for which it has no class of errors."""


class LlavaError(Exception):
    """A fault that the user can fix, in one line: what it is, what was expected, what was got, what to do.

    `exit_code` is the status that the command ends with: 1 failed, 2 wrong usage, 3 too many failed rows.
    `parts` are translated one by one: a path, too, may hold a semicolon.
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
        self.parts = tuple(part.replace("\n", " ") for part in parts)
        super().__init__("; ".join(self.parts))
        self.exit_code = exit_code


@contextlib.contextmanager
def as_llava_error(what: str) -> Iterator[None]:
    """Context for calls of classes that are not this project's: any Exception becomes LlavaError(what)."""
    try:
        yield
    except LlavaError:
        raise
    except Exception as error:
        raise LlavaError(what, got=first_line(error)) from None


def nearest(name: str, known: Sequence[str]) -> str:
    """Advice for a mistyped name: the closest of `known`, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"


def first_line(error: BaseException) -> str:
    """First line of a library's error message, joined with the next one if it ends with a colon."""
    first, *rest = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return " ".join([first, *rest[: first.endswith(":")]]).rstrip(",:") or type(error).__name__


def told(error: Exception) -> str:
    """An error in one line; an OSError without its number."""
    if not isinstance(error, OSError):
        return str(error)
    return str(error.strerror or error) + (f": {error.filename}" if error.filename else "")


def reason(error: BaseException) -> str:
    """The root cause in an error message: requests writes the whole chain of a failed connection."""
    text = first_line(error)
    return re.sub(r"['\"]\)+$", "", text.rsplit(": ", 1)[-1]) if "(Caused by " in text else text
