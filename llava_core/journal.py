"""The list of finished rows beside an unfinished shard: appended to, replayed after a crash.

header   8 bytes of magic, 32 of the shard's uid (hex)
record   fields of RECORD, the last a crc32 of those before it
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.errors import LlavaError
from llava_core.files import flush

MAGIC = b"LLVAJNL1"
HEADER_BYTES = len(MAGIC) + 32
RECORD = np.dtype(
    [
        ("row", "<u4"),
        ("status", "|u1"),
        ("attempts", "|u1"),
        ("http", "<u2"),
        ("nbytes", "<u4"),
        ("orig_hw", "<u4", (2,)),
        ("sha256", "|u1", (32,)),
        ("crc32", "<u4"),
        ("check", "<u4"),
    ]
)


class Journal:
    """Opened for appending; its torn tail, if any, is cut first. `records` are the rows it held then.

    A journal that is not of `uid` begins anew if it `may_begin`; otherwise LlavaError is raised.
    """

    def __init__(self, path: Path, uid: str, may_begin: bool = True) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        data = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        header = MAGIC + uid.encode()
        if not data.startswith(header) and not may_begin:
            os.close(self.descriptor)
            do = "delete it and the .part beside it: the finished shard is whole, only its retry is lost"
            raise LlavaError(f"damaged journal {path}", do=do)
        if not data.startswith(header):  # new, torn at birth, or of a shard that is no more
            data = header
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, header, 0)
            flush(self.descriptor, path)
        whole = _whole(data[HEADER_BYTES:])
        self.records = np.frombuffer(data, RECORD, len(whole), HEADER_BYTES)[whole]
        self.end = HEADER_BYTES + RECORD.itemsize * len(whole)
        os.ftruncate(self.descriptor, self.end)

    def append(self, records: np.ndarray) -> None:
        """Add records (`check` is filled in here) and wait until they are on disk."""
        data = sealed(records).tobytes()
        write_all(self.descriptor, data, self.end)
        flush(self.descriptor, self.path)
        self.end += len(data)

    def close(self) -> None:
        os.close(self.descriptor)


def _whole(data: bytes) -> np.ndarray:
    """Whether each record has its checksum, bool [records], up to the last that has."""
    records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
    whole = records["check"] == np.array(_checks(records), np.uint32)
    return np.asarray(whole[: int(np.flatnonzero(whole)[-1]) + 1 if whole.any() else 0])


def sealed(records: np.ndarray) -> np.ndarray:
    """The same records with their checksums."""
    records = records.copy()
    records["check"] = _checks(records)
    return records


def _checks(records: np.ndarray) -> list[int]:
    size = RECORD.itemsize
    data = records.tobytes()
    return [zlib.crc32(data[start : start + size - 4]) for start in range(0, len(data), size)]


def write_all(descriptor: int, data: bytes | np.ndarray, offset: int) -> None:
    """pwrite until everything is written; raises OSError (disk full, say)."""
    view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def write_file(path: Path, uid: str, records: Sequence[Any] | np.ndarray) -> None:
    """A whole journal at once, under a temporary name first."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(MAGIC + uid.encode() + sealed(np.asarray(records, RECORD)).tobytes())
        file.flush()
        flush(file.fileno(), path)
    partial.replace(path)
