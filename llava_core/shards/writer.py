"""Filling a shard so that a crash at any moment loses at most the batch being written.

x.h5.part.tmp   being created; worthless after a crash
x.h5.part       created; HDF5 never opens it for writing again
x.h5.journal    rows that are finished in it (llava_core.shards.journal)
x.h5.lock       who is writing
x.h5            finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from llava_core.cli.console import counted, human_bytes, say
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock, flush, fsync, write_all
from llava_core.row_status import Failure, Status
from llava_core.shards import file_checksums
from llava_core.shards.format import ShardHeader, create_file, read_layout
from llava_core.shards.journal import Journal, record_type, write_file
from llava_core.shards.layout import SLOT_BYTES, THUMBNAIL_BYTES, Layout, columns
from llava_core.shards.quantize import FEATURE_TYPE, Storage, checksum, pack
from llava_core.shards.reader import Shard


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
    """When its image file was last modified, in ns since 1970; 0 if it came from no file."""
    thumbnail: bytes | None = None
    """A JPEG of at most THUMBNAIL_BYTES, kept if the status is OK and the shard has space for it."""


class FinishedMeanwhile(Exception):
    """Another process has finished the shard since we looked."""


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def is_finished(path: Path) -> bool:
    """Whether `path` is whole and no retry of its failed rows is under way."""
    return path.exists() and not part_of(path).exists()


class ShardWriter:
    """Writes the rows of one shard in any order; use it in a `with` block.

    Leaving the block without `finish` keeps everything written for the next time. `done` [N] says which rows
    are finished already; one whose features are not what the journal says is not, and that is said.
    """

    def __init__(
        self, path: Path, header: ShardHeader | None = None, retry: Sequence[Failure] | np.ndarray = ()
    ) -> None:
        """Create, or continue, the shard at `path`; with `retry`, fill its rows that failed so again.

        `retry` may also be a mask of any rows, bool [N].

        Raises LlavaError if another process holds it, if what is there has another fingerprint or source, or
        if the disk is too small; FinishedMeanwhile if there is nothing left to do.
        """
        self.path, self.part = path, part_of(path)
        with contextlib.ExitStack() as stack:
            self._lock = Lock(path)
            stack.callback(self._lock.release)
            if not self.part.exists():
                if len(retry):
                    self._reopen(retry)
                elif path.exists():
                    raise FinishedMeanwhile
                else:
                    assert header is not None
                    self._create(header)
            self.layout = read_layout(self.part)
            if header is not None:
                self._require_same(header)
            # Beside a finished shard a part is a copy on which rows are retried, with a journal from birth.
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
        """When the image file of each row that has its outcome was last modified, i8 [N], as in Shard."""
        found = self.layout.mtime(self._descriptor)
        return np.where(self.done, found[0] if found else 0, 0)

    @property
    def nbytes(self) -> np.ndarray:
        """Of each image, u4 [N]."""
        return np.asarray(self._records["nbytes"])

    @property
    def sha256(self) -> np.ndarray:
        """Of each image, u1 [N, 32]."""
        return np.asarray(self._records["sha256"])

    def make_again(self, rows: np.ndarray) -> None:
        """Forget the outcomes of these rows, a mask [N]."""
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
        flush(self._descriptor, self.path)
        self._journal.append(records)
        self._records[records["row"]] = records

    def outcome(self, row: int) -> RowRecord:
        """What was written of a row, without its features."""
        record = self._records[row]
        return RowRecord(
            row=row,
            status=Status(int(record["status"])),
            http=int(record["http"]),
            attempts=int(record["attempts"]),
            nbytes=int(record["nbytes"]),
            orig_hw=(int(record["orig_hw"][0]), int(record["orig_hw"][1])),
            sha256=record["sha256"].tobytes(),
        )

    def read(self, row: int) -> np.ndarray:
        """The features that were written of a row: fp16 [T, D]. Raises LlavaError if they are damaged."""
        out = np.empty((self.layout.tokens, self.layout.width), FEATURE_TYPE)
        self.layout.read_into(self._descriptor, row, out, int(self._records[row][self.layout.checksum]))
        return out

    def thumbnail(self, row: int) -> bytes | None:
        """The small JPEG that was written of a row, if the shard keeps them."""
        return self.layout.read_thumbnail(self._descriptor, row)

    def _write_features(self, row: int, features: np.ndarray) -> int:
        """Returns their checksum."""
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
        """Rows whose bytes are not what the journal says of them are to be made again."""
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
        """Write the columns and give the shard its name. Every row must have an outcome."""
        assert self.done.all(), f"{(~self.done).sum()} rows without an outcome"
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
        fsync(self.part)
        self.part.replace(self.path)
        fsync(self.path.parent)
        journal_of(self.path).unlink()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _create(self, header: ShardHeader) -> None:
        texts = itertools.chain(header.captions, header.urls, header.ids)
        text_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        self._require_space(header.disk_bytes + text_bytes)
        with self._partial() as partial:
            create_file(partial, header)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise LlavaError(
                f"not enough disk space for {self.path}",
                expected=human_bytes(needed),
                got=f"{human_bytes(free)} free",
                do="free some, choose another --out, or take fewer rows with --limit",
            )

    def _reopen(self, retry: Sequence[Failure] | np.ndarray) -> None:
        """Copy a finished shard to a part in which these rows are pending again."""
        shard = Shard(self.path)
        version = shard.layout.version
        records = np.zeros(shard.rows, record_type(version))
        records["row"] = np.arange(shard.rows)
        for name in columns(version):
            records[name] = getattr(shard, "checksums" if name == shard.layout.checksum else name)
        again = retry if isinstance(retry, np.ndarray) else shard.failed(retry)
        self._require_space(self.path.stat().st_size)
        with self._partial() as partial:
            shutil.copyfile(self.path, partial)
            # The journal first: alone it means nothing, while a part alone would start from nothing.
            write_file(journal_of(self.path), shard.layout.uid, version, records[~again])

    @contextlib.contextmanager
    def _partial(self) -> Iterator[Path]:
        """A file that becomes the part once it is whole and on disk."""
        partial = self.part.with_name(self.part.name + ".tmp")
        try:
            yield partial
            fsync(partial)
        except Exception:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(self.part)
        fsync(self.path.parent)

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
