"""A shard that is being written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from extract.open_output import Cache, OpenOutput
from extract.sources.base import Images
from llava_core.row_status import Outcome, Status
from llava_core.shards.byte_offsets import Layout
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter


def cache_of(layout: Layout) -> Cache:
    """The cache that a shard of this layout belongs to."""
    return Cache(layout.identity.fingerprint, layout.storage)


class OpenShard(OpenOutput):
    """A shard's writer, and what waits to be written by it."""

    def __init__(
        self,
        writer: ShardWriter,
        urls: Sequence[str],
        captions: Sequence[str | None],
        images: Images | None = None,
        outcomes: Mapping[int, Outcome] = MappingProxyType({}),
        kept: Mapping[int, Shard] = MappingProxyType({}),
    ) -> None:
        super().__init__(cache_of(writer.layout), urls, captions, writer.done, images, outcomes, kept)
        self.writer = writer

    @property
    def thumbnails(self) -> bool:
        return self.writer.layout.thumbnails

    def earlier(self) -> Iterator[RowRecord]:
        return map(self.writer.outcome, np.flatnonzero(self.writer.status == Status.OK).tolist())

    def outcome(self, record: RowRecord) -> RowRecord:
        if record.status is not Status.OK:
            return record
        for waiting in self.waiting:
            if waiting.row == record.row:
                return waiting
        source = self.writer if self.missing else Shard(self.writer.path)
        features, thumbnail = source.read(record.row), source.thumbnail(record.row)
        return dataclasses.replace(record, features=features, thumbnail=thumbnail)

    def take_file(self, record: RowRecord, body: bytes) -> None:
        """A shard keeps no files."""

    def _append(self, records: Sequence[RowRecord]) -> None:
        self.writer.write(records)

    def _finish(self) -> None:
        self.writer.finish()

    def close(self) -> None:
        self.writer.__exit__(None, None, None)
