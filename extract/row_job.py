"""Images on their way through the stages, the rows they are for, and the rows that these may duplicate."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from extract.open_output import OpenOutput
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord


class RowRef(NamedTuple):
    """A row of an output."""

    shard: OpenOutput
    row: int


@dataclasses.dataclass(slots=True)
class RowJob:
    """A row on its way to its output. Each stage fills in its part."""

    shard: OpenOutput
    record: RowRecord
    """Outcome so far."""
    duplicate_of: InFlightRow | StoredRow | None = None
    """Row with the same image, whose outcome this one takes over."""

    def take_over(self, found: RowRecord) -> None:
        """Take over the outcome of another row; what is known of this row's own download stays."""
        own = self.record
        self.record = dataclasses.replace(
            found, row=own.row, http=own.http or found.http, attempts=own.attempts, mtime=own.mtime
        )


@dataclasses.dataclass(slots=True)
class ImageJob:
    """An image on its way to its features, and the row that it is for in each of the caches."""

    rows: list[RowJob]
    body: bytes = b""
    """Image file, between download and decoding."""
    pixels: np.ndarray | None = None
    """u1 [H, W, 3], between decoding and encoding."""


Job = TypeVar("Job", contravariant=True)


class JobSink(Protocol[Job]):
    """Where a stage puts its jobs: the inbox of the next stage."""

    async def put(self, item: Job | None) -> None:
        """Put a job, or None after the last one."""


@dataclasses.dataclass
class InFlightRow:
    """The first row of the open shards with some address or image."""

    ref: RowRef
    record: RowRecord | None = None
    """Outcome, without features and thumbnail; None until it is known."""
    waiters: list[RowJob] = dataclasses.field(default_factory=list)
    """Duplicates that take over the outcome when it is known."""

    @property
    def thumbnails(self) -> bool:
        return self.ref.shard.thumbnails

    def outcome(self) -> RowRecord:
        """Outcome with features and thumbnail; `record` must be known."""
        assert self.record is not None
        return self.ref.shard.outcome(self.record)


@dataclasses.dataclass(frozen=True)
class StoredRow:
    """A row of a finished shard."""

    shard: Shard
    row: int

    @property
    def thumbnails(self) -> bool:
        return self.shard.layout.thumbnails

    def outcome(self) -> RowRecord:
        """Outcome with features and thumbnail."""
        shard, row = self.shard, self.row
        height, width = shard.orig_hw[row].tolist()
        return RowRecord(
            row=row,
            status=Status.OK,
            features=shard.read(row),
            http=int(shard.http[row]),
            nbytes=int(shard.nbytes[row]),
            orig_hw=(height, width),
            sha256=shard.sha256[row].tobytes(),
            reason=shard.reason_of(row),
            thumbnail=shard.thumbnail(row),
        )
