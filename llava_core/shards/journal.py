"""Write-ahead journal of finished rows beside an unfinished shard: appended to, replayed after a crash.

header   8 bytes of magic, the last the shard's format version, and 32 of its uid (hex)
record   fields of `record_type`, the last a crc32 of those before it
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.filesystem import flush, write_all
from llava_core.shards.byte_offsets import CHECKSUMS, FORMAT_VERSION, columns

MAGIC = b"LLVAJNL"
HEADER_BYTES = len(MAGIC) + 1 + 32


def record_type(version: int) -> np.dtype[Any]:
    """Fields of a record, for shards of this format version."""
    return np.dtype(
        [
            ("row", "<u4"),
            ("status", "|u1"),
            ("attempts", "|u1"),
            ("http", "<u2"),
            ("nbytes", "<u4"),
            ("orig_hw", "<u4", (2,)),
            ("sha256", "|u1", (32,)),
            CHECKSUMS[version],
            *([("reason", columns(version)["reason"][0])] if version > 2 else []),
            ("check", "<u4"),
        ]
    )


RECORD = record_type(FORMAT_VERSION)


class Journal:
    """A journal opened for appending. `records` are the whole records found; a torn tail is cut off.

    A journal of another shard than `uid` is emptied if `may_begin`; otherwise LlavaError is raised. Prints
    what is lost, except for a torn tail.
    """

    def __init__(self, path: Path, uid: str, version: int = FORMAT_VERSION, may_begin: bool = True) -> None:
        self.path, kind = path, record_type(version)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        data = os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)
        header = _header(uid, version)
        if not data.startswith(header) and not may_begin:
            os.close(self.descriptor)
            do = "delete it and the .part beside it: the finished shard is whole, only the changes are lost"
            raise LlavaError(f"damaged journal {path}", do=do)
        if not data.startswith(header):  # new, torn in its header, or of a shard that was deleted
            if len(data) > HEADER_BYTES:
                say(f"{path} is damaged, or of another shard: its rows are made again")
            data = header
            os.ftruncate(self.descriptor, 0)
            write_all(self.descriptor, header, 0)
            flush(self.descriptor, path)
        whole = _whole(data[HEADER_BYTES:], kind)
        if lost := int((~whole).sum()):
            say(f"{counted(lost, 'record')} of {path} damaged: those rows are made again")
        self.records = np.frombuffer(data, kind, len(whole), HEADER_BYTES)[whole]
        self.end = HEADER_BYTES + kind.itemsize * len(whole)
        os.ftruncate(self.descriptor, self.end)

    def append(self, records: np.ndarray) -> None:
        """Append records, whose field `check` is filled in here, and wait until they are on disk."""
        data = sealed(records).tobytes()
        write_all(self.descriptor, data, self.end)
        flush(self.descriptor, self.path)
        self.end += len(data)

    def close(self) -> None:
        os.close(self.descriptor)


def _header(uid: str, version: int) -> bytes:
    return MAGIC + str(version).encode() + uid.encode()


def _whole(data: bytes, kind: np.dtype[Any]) -> np.ndarray:
    """Whether each record has its checksum, bool [records]; ends with the last one that has."""
    records = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
    whole = records["check"] == np.array(_checks(records), np.uint32)
    return np.asarray(whole[: int(np.flatnonzero(whole)[-1]) + 1 if whole.any() else 0])


def sealed(records: np.ndarray) -> np.ndarray:
    """A copy of the records with their checksums filled in."""
    records = records.copy()
    records["check"] = _checks(records)
    return records


def _checks(records: np.ndarray) -> list[int]:
    size = records.dtype.itemsize
    data = records.tobytes()
    return [zlib.crc32(data[start : start + size - 4]) for start in range(0, len(data), size)]


def write_file(path: Path, uid: str, version: int, records: np.ndarray) -> None:
    """Write a journal in one step: under a temporary name, then renamed."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(_header(uid, version) + sealed(records).tobytes())
        file.flush()
        flush(file.fileno(), path)
    partial.replace(path)
