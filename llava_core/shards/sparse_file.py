"""An in-memory sparse file for HDF5 to write into: bytes that were never written take no memory."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_core.filesystem import flush, write_all

PAGE = 4096
"""Bytes of a page, the unit of memory of a SparseFile."""


class SparseFile(io.RawIOBase):
    """A sparse file in memory, saved to disk at the end.

    HDF5 writes into it because on disk it may swallow the error of a single write, such as on a full disk.
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
        """Write the content to a new file. Raises OSError if it reads back with other bytes."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, self._size)
            for page, held in sorted(self._pages.items()):
                write_all(descriptor, held[: max(0, self._size - page * PAGE)], page * PAGE)
            flush(descriptor, path, whole=True)
        finally:
            os.close(descriptor)
