"""Files written whole or not at all, and kept through a loss of power; and lines of JSON read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from llava_core.console import say
from llava_core.fingerprint import JsonDict

LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Of an OSError from a lock or a flush: the file system, such as some over a network or FUSE, has none."""
UNSAFE = ("its file system does not wait for the disk", "a loss of power may cost what was written last")


def read_json_lines(path: Path) -> list[JsonDict]:
    """The objects of a file of ours, without a last line that is still being written."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at U+2028, too
    return [json.loads(line) for line in lines]


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it, in one step: UTF-8, under a temporary name first."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk, if its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with tolerated(path, without_flush):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int, path: Path) -> None:
    """Wait for the bytes, and they alone, that were written to the open file at `path`, likewise."""
    with tolerated(path, without_flush):
        os.fdatasync(descriptor)


def without_flush(folder: Path, reason: str) -> str:
    """The warning about a file system that cannot flush."""
    return (
        f"{folder}: its file system does not wait for the disk ({reason}); "
        "a loss of power may cost what was written last"
    )


@contextlib.contextmanager
def tolerated(path: Path, warning: Callable[[Path, str], str]) -> Iterator[None]:
    """Say once of each file system that it lacks what the block asks for; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise
        folder = path if path.is_dir() else path.absolute().parent
        if (told := (os.stat(folder).st_dev, warning)) not in _told:
            _told.add(told)
            say(warning(folder, error.strerror or str(error)))


_told: set[tuple[int, Callable[[Path, str], str]]] = set()
