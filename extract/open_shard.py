"""A shard that is being written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from extract.sources.base import Images, host_of, is_address
from llava_core.row_status import Outcome, Status
from llava_core.shards.byte_offsets import Layout
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter


class Cache(NamedTuple):
    """What two shards have in common whose features may be copied from one to the other."""

    fingerprint: str
    storage: str


def cache_of(layout: Layout) -> Cache:
    """The cache that a shard of this layout belongs to."""
    return Cache(layout.identity.fingerprint, layout.storage)


class OpenShard:
    """A shard's writer and text, its pending rows, and the outcomes that wait to be written."""

    def __init__(
        self,
        writer: ShardWriter,
        urls: Sequence[str],
        captions: Sequence[str | None],
        images: Images | None = None,
        outcomes: Mapping[int, Outcome] = MappingProxyType({}),
        kept: Mapping[int, Shard] = MappingProxyType({}),
    ) -> None:
        """`outcomes`: rows whose outcome is known already; `kept`: rows whose features an older shard has."""
        self.writer, self.urls, self.captions, self.images = writer, urls, captions, images
        self.outcomes, self.kept = outcomes, kept
        self.cache = cache_of(writer.layout)
        self.pending: list[int] = np.flatnonzero(~writer.done).tolist()
        """Rows without an outcome when it was opened."""
        self.missing = len(self.pending)
        """Rows that are not written yet."""
        self.waiting: list[RowRecord] = []
        """Outcomes to be written."""
        self.started = time.monotonic()

    def host(self, row: int) -> str | None:
        """Host of the row's image; None if it needs no network."""
        return None if self.images and not is_address(self.urls[row]) else host_of(self.urls[row])

    def write(self) -> None:
        """Make the waiting outcomes durable. The last ones finish the shard."""
        records, self.waiting = self.waiting, []
        if records:
            self.writer.write(records)
        self.missing -= len(records)
        if self.missing == 0:
            self.writer.finish()
            self.close()

    def outcome(self, record: RowRecord) -> RowRecord:
        """An outcome of this shard, features and thumbnail included. Must not run while `write` does."""
        if record.status is not Status.OK:
            return record
        for waiting in self.waiting:
            if waiting.row == record.row:
                return waiting
        source = self.writer if self.missing else Shard(self.writer.path)
        features, thumbnail = source.read(record.row), source.thumbnail(record.row)
        return dataclasses.replace(record, features=features, thumbnail=thumbnail)

    def close(self) -> None:
        self.writer.__exit__(None, None, None)
