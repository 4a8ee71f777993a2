"""Files written whole or not at all, kept through a loss of power, and read back; and lines of JSON read."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.console import say
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict, sha256_files

SUMS = "SHA256SUMS"
"""The sha256 of a folder's files, as `sha256sum --check` reads it. A change of any byte of it is noticed."""
RESTORE = "restore it from a copy"
PAGE = 4096
"""Bytes of a part of a SparseFile."""

LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Of an OSError from a lock or a flush: the file system, such as some over a network or FUSE, has none."""


def read_json_lines(path: Path) -> list[JsonDict]:
    """The objects of a file of ours, without a last line that is still being written."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at U+2028, too
    return [json.loads(line) for line in lines]


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it, in one step: UTF-8, under a temporary name first."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_all(descriptor: int, data: bytes | bytearray | np.ndarray, offset: int) -> None:
    """pwrite until everything is written, then read it back. Raises OSError: a full disk, or other bytes."""
    view = data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else memoryview(data)
    start, rest = offset, view
    while rest:
        written = os.pwrite(descriptor, rest, start)
        if not written:
            raise OSError(errno.EIO, "a write to this disk does nothing")
        rest, start = rest[written:], start + written
    if os.pread(descriptor, len(view), offset) != bytes(view):  # a memoryview compares byte by byte
        raise OSError(errno.EIO, "bytes read back are not those written: this disk or file system is faulty")


class SparseFile(io.RawIOBase):
    """A file in memory in which what was never written takes no space; then put on disk.

    HDF5 writes into it: on a disk it would swallow an error of one write, such as a full disk's.
    """

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._at = self._size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        return self._size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._at))
        for start, page, place, length in self._spans(count):
            held = self._pages.get(page)
            view[start : start + length] = held[place : place + length] if held else bytes(length)
        self._at += count
        return count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start, page, place, length in self._spans(len(view)):
            held = self._pages.setdefault(page, bytearray(PAGE))
            held[place : place + length] = view[start : start + length]
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def _spans(self, count: int) -> Iterator[tuple[int, int, int, int]]:
        """(offset in the data, page, offset in the page, bytes) of the next `count` bytes."""
        done = 0
        while done < count:
            page, place = divmod(self._at + done, PAGE)
            length = min(PAGE - place, count - done)
            yield done, page, place, length
            done += length

    def save(self, path: Path) -> None:
        """Write it to a new file; raises OSError if what is read back is not what was written."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, self._size)
            for page, held in sorted(self._pages.items()):
                write_all(descriptor, held[: max(0, self._size - page * PAGE)], page * PAGE)
            with tolerated(path, without_flush):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """SHA256SUMS of a folder, from the sha256 of its files by their names."""
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 by file name. Raises LlavaError if the list is damaged, OSError if there is none."""
    text = (folder / SUMS).read_bytes().decode("utf-8", "replace")
    lines = [re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line) for line in text.removesuffix("\n").split("\n")]
    sums = {line[2]: line[1] for line in lines if line}
    if len(sums) < len(lines):
        raise LlavaError(f"damaged {folder / SUMS}", expected="a sha256 and a name on each line", do=RESTORE)
    return sums


def require_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise LlavaError naming the first of these files that SHA256SUMS does not list as it is now."""
    sums = read_sums(folder)
    for name in names:
        try:
            now = sha256_files([folder / name])
        except OSError as error:
            raise LlavaError(f"{folder / name} cannot be read", got=error.strerror, do=RESTORE) from None
        if sums.get(name) != now:
            raise LlavaError(
                f"{folder / name} is damaged, or was edited",
                expected=f"sha256 {sums[name][:12]}…, as {SUMS} says" if name in sums else f"it in {SUMS}",
                got=f"{now[:12]}…",
                do=f"{RESTORE}; if you edited it, put the line that `sha256sum {name}` prints into {SUMS}",
            )


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
