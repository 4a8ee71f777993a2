"""Writes a shard so that a crash at any moment loses at most the batch being written.

`part_file` lists the files beside a shard that is being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock, flush, fsync, write_all
from llava_core.row_status import Failure, Status
from llava_core.shards import file_checksums
from llava_core.shards.byte_offsets import REASON_BYTES, SLOT_BYTES, THUMBNAIL_BYTES, Layout, columns
from llava_core.shards.hdf5_file import ShardHeader, read_layout
from llava_core.shards.journal import Journal, record_type
from llava_core.shards.part_file import FinishedMeanwhile, copy_to_part, create_part, journal_of, part_of
from llava_core.shards.quantize import FEATURE_TYPE, Storage, checksum, pack
from llava_core.shards.reader import reason_text


@dataclasses.dataclass
class RowRecord:
    """The outcome of one row."""

    row: int
    status: Status
    features: np.ndarray | None = None
    """fp16 [T, D] if the status is OK."""
    http: int = 0
    attempts: int = 0
    nbytes: int = 0
    orig_hw: tuple[int, int] = (0, 0)
    sha256: bytes = bytes(32)
    mtime: int = 0
    """Modification time of its image file, in ns since 1970; 0 if it came from no file."""
    reason: str = ""
    """Why the row failed, in words, or what an ok row lacks. Nothing of its address or host."""
    thumbnail: bytes | None = None
    """A JPEG of at most THUMBNAIL_BYTES, kept if the status is OK and the shard has space for it."""


class ShardWriter:
    """Writes the rows of one shard in any order; use it in a `with` block.

    Leaving the block without `finish` keeps everything written for the next time. Rows whose features do not
    have the checksum in the journal are pending again, and a log line names them.
    """

    def __init__(
        self,
        path: Path,
        header: ShardHeader | None = None,
        retry: Sequence[Failure] | np.ndarray = (),
        replace: bool = False,
    ) -> None:
        """Create, or continue, the shard at `path`; with `retry`, make the rows with these failures anew.

        `retry` may also be a mask of any rows, bool [N]. With `replace`, a finished shard of another source
        stays until the new one takes its place.

        Raises LlavaError if another process holds the shard, if it has another fingerprint or source, or if
        the disk is too small; FinishedMeanwhile if it is finished, and nothing in it is to be made anew.
        """
        self.path, self.part = path, part_of(path)
        with contextlib.ExitStack() as stack:
            self._lock = Lock(path)
            stack.callback(self._lock.release)
            if not self.part.exists():
                if len(retry):
                    copy_to_part(path, retry)
                elif path.exists() and not (replace and header and read_layout(path).source != header.source):
                    raise FinishedMeanwhile
                else:
                    assert header is not None
                    create_part(path, header)
            self.layout = read_layout(self.part)
            if header is not None:
                self._require_same(header)
            # Beside a finished shard a part has a journal from birth: see `create_part` and `copy_to_part`.
            self._journal = Journal(
                journal_of(path), self.layout.uid, self.layout.version, may_begin=not path.exists()
            )
            stack.callback(self._journal.close)
            self._descriptor = os.open(self.part, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, self._descriptor)
            self._records: np.ndarray = np.zeros(self.layout.rows, record_type(self.layout.version))
            self._records["row"] = np.arange(self.layout.rows)
            self._records[self._journal.records["row"]] = self._journal.records
            self._drop_damaged()
            self._stack = stack.pop_all()

    @property
    def done(self) -> np.ndarray:
        """Whether each row has its outcome, bool [N]."""
        return np.asarray(self._records["status"] != Status.PENDING)

    @property
    def status(self) -> np.ndarray:
        """Outcome of every row so far, u1 [N]."""
        return np.asarray(self._records["status"])

    @property
    def mtime(self) -> np.ndarray:
        """Modification time of each finished row's image file, i8 [N], as in Shard."""
        found = self.layout.mtime(self._descriptor)
        return np.where(self.done, found[0] if found else 0, 0)

    @property
    def nbytes(self) -> np.ndarray:
        """Bytes of each image file, u4 [N]."""
        return np.asarray(self._records["nbytes"])

    @property
    def sha256(self) -> np.ndarray:
        """sha256 of each image file, u1 [N, 32]."""
        return np.asarray(self._records["sha256"])

    def make_again(self, rows: np.ndarray) -> None:
        """Make these rows pending again; `rows` is a mask, bool [N]."""
        self._records["status"][rows] = Status.PENDING

    def write(self, outcomes: Sequence[RowRecord]) -> None:
        """Put rows on disk: features first, then, once those are safe, the journal. Best 64-256 at a time.

        Raises OSError if the disk is full; what was written before stays.
        """
        records = np.zeros(len(outcomes), self._records.dtype)
        for record, outcome in zip(records, outcomes, strict=True):
            if outcome.features is not None:
                record[self.layout.checksum] = self._write_features(outcome.row, outcome.features)
                if self.layout.thumbnails:
                    self._write_thumbnail(outcome)
            if "mtime" in self.layout.offsets:
                offset = self.layout.offsets["mtime"] + 8 * outcome.row
                write_all(self._descriptor, outcome.mtime.to_bytes(8, "little", signed=True), offset)
            for name in ("row", "status", "http", "nbytes", "orig_hw"):
                record[name] = getattr(outcome, name)
            record["attempts"] = min(outcome.attempts, 255)
            record["sha256"] = np.frombuffer(outcome.sha256, np.uint8)
            if "reason" in self.layout.offsets:
                record["reason"] = _cut(outcome.reason)
        flush(self._descriptor, self.path)
        self._journal.append(records)
        self._records[records["row"]] = records

    def outcome(self, row: int) -> RowRecord:
        """Outcome of a row as it was written, without its features."""
        record = self._records[row]
        return RowRecord(
            row=row,
            status=Status(int(record["status"])),
            http=int(record["http"]),
            attempts=int(record["attempts"]),
            nbytes=int(record["nbytes"]),
            orig_hw=(int(record["orig_hw"][0]), int(record["orig_hw"][1])),
            sha256=record["sha256"].tobytes(),
            reason=reason_text(bytes(record["reason"])) if "reason" in self.layout.offsets else "",
        )

    def read(self, row: int) -> np.ndarray:
        """Features of a row as they were written, fp16 [T, D]. Raises LlavaError if they are damaged."""
        out = np.empty((self.layout.tokens, self.layout.width), FEATURE_TYPE)
        self.layout.read_into(self._descriptor, row, out, int(self._records[row][self.layout.checksum]))
        return out

    def thumbnail(self, row: int) -> bytes | None:
        """Thumbnail of a row, a JPEG; None if the shard keeps none."""
        return self.layout.read_thumbnail(self._descriptor, row)

    def _write_features(self, row: int, features: np.ndarray) -> int:
        """Write the features of a row; returns their checksum."""
        assert features.shape == (self.layout.tokens, self.layout.width), features.shape
        arrays = pack(self.layout.storage, features)
        for name, array in zip(self.layout.parts, arrays, strict=True):
            write_all(self._descriptor, array, self.layout.offsets[name] + row * array.nbytes)
        return checksum(arrays, self.layout.checksum)

    def _write_thumbnail(self, outcome: RowRecord) -> None:
        slot = (outcome.thumbnail or b"").ljust(THUMBNAIL_BYTES, b"\0")
        assert len(slot) == THUMBNAIL_BYTES, len(slot)
        own = checksum([np.frombuffer(slot, np.uint8)], seed=outcome.row) if self.layout.version > 1 else 0
        slot += own.to_bytes(SLOT_BYTES - THUMBNAIL_BYTES, "little")
        write_all(self._descriptor, slot, self.layout.offsets["thumbnails"] + outcome.row * SLOT_BYTES)

    def _drop_damaged(self) -> None:
        """Make rows pending again whose bytes do not have the checksum in the journal."""
        recorded = self._records[self.layout.checksum]
        damaged = [
            row
            for row in np.flatnonzero(self.status == Status.OK).tolist()
            if not self.layout.is_whole(self._descriptor, row, int(recorded[row]))
        ]
        if damaged:
            self._records["status"][damaged] = Status.PENDING
            named = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            say(f"{counted(len(damaged), 'row')} of {self.part} damaged, to be made again: {named}")

    def finish(self) -> None:
        """Write the columns and rename the part to the shard. Every row must have an outcome."""
        assert self.done.all(), f"{(~self.done).sum()} rows without an outcome"
        self.write_columns()
        fsync(self.part)
        self.part.replace(self.path)
        fsync(self.path.parent)
        journal_of(self.path).unlink()

    def write_columns(self) -> None:
        """Write the outcomes so far into the part, which can then be read as a shard."""
        held = {
            name: np.ascontiguousarray(self._records[name], kind)
            for name, (kind, _) in columns(self.layout.version).items()
        }
        for name, column in held.items():
            write_all(self._descriptor, column, self.layout.offsets[name])
        if self.layout.version > 1:
            whole = np.array(
                [checksum([*held.values(), *self.layout.mtime(self._descriptor)])], file_checksums.NUMBER
            )
            write_all(self._descriptor, whole, file_checksums.COLUMNS * whole.nbytes)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _require_same(self, header: ShardHeader) -> None:
        self.layout.identity.require_same(
            header.identity,
            f"{self.part} was begun with another encoder",
            do=f"use that encoder, choose another --out, or delete {self.part.name}",
        )
        if self.layout.source != header.source:
            raise LlavaError(
                f"{self.part} was begun from another file",
                expected=self.layout.source,
                got=header.source,
                do=f"choose another --out, or delete {self.part.name}",
            )
        require_storage(self.part, self.layout, header.storage)


def require_storage(path: Path, layout: Layout, storage: Storage) -> None:
    """Raise LlavaError unless the shard at `path` stores features in that way."""
    if layout.storage != storage:
        raise LlavaError(
            f"{path} holds features as {layout.storage}",
            expected=f"--dtype {storage}",
            do=f"give --dtype {layout.storage}, choose another --out, or delete {path.name}",
        )


def _cut(reason: str) -> bytes:
    """A reason in at most REASON_BYTES bytes; an ellipsis stands for what is left out."""
    encoded, dots = reason.encode("utf-8", "replace"), "…".encode()
    return encoded if len(encoded) <= REASON_BYTES else encoded[: REASON_BYTES - len(dots)] + dots
