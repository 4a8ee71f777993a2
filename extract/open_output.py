"""A file that the rows of a source are being written to."""

from __future__ import annotations

import abc
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from extract.sources.base import Images, host_of, is_address
from llava_core.row_status import Outcome
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord


class Cache(NamedTuple):
    """What two outputs have in common of which one may take over rows of the other."""

    fingerprint: str
    """Of the encoder; for image files, where they are kept."""
    storage: str


class OpenOutput(abc.ABC):
    """The text of a source's rows, the pending ones, and the outcomes that wait to be written.

    `OpenShard` writes their features, `OpenTar` their image files.
    """

    def __init__(
        self,
        cache: Cache,
        urls: Sequence[str],
        captions: Sequence[str | None],
        done: np.ndarray,
        images: Images | None = None,
        outcomes: Mapping[int, Outcome] = MappingProxyType({}),
        kept: Mapping[int, Shard] = MappingProxyType({}),
    ) -> None:
        """`done`: whether each row is written, bool [N]; `outcomes`: rows whose outcome is known already;
        `kept`: rows whose features an older shard has."""
        self.cache, self.urls, self.captions, self.images = cache, urls, captions, images
        self.outcomes, self.kept = outcomes, kept
        self.pending: list[int] = np.flatnonzero(~done).tolist()
        """Rows without an outcome when it was opened."""
        self.missing = len(self.pending)
        """Rows that are not written yet."""
        self.waiting: list[RowRecord] = []
        """Outcomes to be written."""
        self.started = time.monotonic()

    @property
    def thumbnails(self) -> bool:
        """Whether it has room for them."""
        return False

    def host(self, row: int) -> str | None:
        """Host of the row's image; None if it needs no network."""
        return None if self.images and not is_address(self.urls[row]) else host_of(self.urls[row])

    def write(self) -> None:
        """Make the waiting outcomes durable. The last ones finish it."""
        records, self.waiting = self.waiting, []
        if records:
            self._append(records)
        self.missing -= len(records)
        if self.missing == 0:
            self._finish()
            self.close()

    @abc.abstractmethod
    def take_file(self, record: RowRecord, body: bytes) -> None:
        """Take the image file of a row, in any thread, if it keeps files."""

    @abc.abstractmethod
    def earlier(self) -> Iterator[RowRecord]:
        """What an interrupted run has written of rows that are OK, without features."""

    @abc.abstractmethod
    def outcome(self, record: RowRecord) -> RowRecord:
        """One of its outcomes, with all that it has of it. Must not run while `write` does."""

    @abc.abstractmethod
    def _append(self, records: Sequence[RowRecord]) -> None: ...

    @abc.abstractmethod
    def _finish(self) -> None: ...

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file, finished or not."""
