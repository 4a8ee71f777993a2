"""Duplicates: rows with the image of another row of their cache are fetched once and encoded once.

A row's keys are its address and the sha256 of its image file. Rows of open shards are kept in a dict; of
finished shards 16 bytes per row and key are kept, and a hit is checked in the shard itself.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from extract.open_output import Cache, OpenOutput
from extract.open_shard import cache_of
from extract.row_job import InFlightRow, RowJob, RowRef, StoredRow
from extract.sources.base import is_address
from llava_core.errors import LlavaError
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord

Key = str | bytes
HELD_SHARDS = 64
"""Finished shards that are held in memory to check hits."""


class Deduplicator:
    """Finds the row with the same address or image. `claim` may be called from any thread."""

    def __init__(self, finished: Iterable[Shard] = ()) -> None:
        """`finished`: shards of earlier runs."""
        self._open: dict[tuple[Cache, Key], InFlightRow] = {}
        self._keys: dict[RowRef, list[tuple[Cache, Key]]] = {}
        self._urls, self._images = _KeyTable(), _KeyTable()
        self._paths: list[tuple[Path, Cache]] = []
        self._shard = functools.lru_cache(HELD_SHARDS)(Shard)
        self.copied: collections.Counter[Path] = collections.Counter()
        """Rows that have been found in each finished shard."""
        self._counting = threading.Lock()
        for shard in finished:
            self.add_finished(shard)

    def claim(self, key: Key, ref: RowRef) -> InFlightRow | StoredRow | None:
        """The row with the same key and all that this one's shard keeps; None if there is none."""
        found = self._claim(key, ref)
        if found is not None and ref.shard.thumbnails and not found.thumbnails:
            return None
        if isinstance(found, StoredRow):
            with self._counting:
                self.copied[found.shard.path] += 1
        return found

    def _claim(self, key: Key, ref: RowRef) -> InFlightRow | StoredRow | None:
        cache = ref.shard.cache
        if stored := next(self._stored(key, cache), None):
            return stored
        first = self._open.setdefault((cache, key), InFlightRow(ref))
        if first.ref != ref:
            return first
        self._keys.setdefault(ref, []).append((cache, key))
        return None

    def settle(self, ref: RowRef, record: RowRecord) -> list[RowJob]:
        """Record the outcome of a row; returns the jobs that waited for it."""
        waiters: list[RowJob] = []
        for key in self._keys.get(ref, ()):
            first = self._open[key]
            first.record = dataclasses.replace(record, features=None, thumbnail=None)
            waiters += first.waiters
            first.waiters = []
        return waiters

    def add_open(self, shard: OpenOutput) -> None:
        """Add the rows that an interrupted run has written."""
        for record in shard.earlier():
            ref = RowRef(shard, record.row)
            if shard.host(record.row) is not None:
                self._claim(shard.urls[record.row], ref)
            self._claim(record.sha256, ref)
            self.settle(ref, record)

    def drop_open(self, shard: OpenOutput) -> None:
        """Drop the rows of an output that is finished."""
        for row in range(len(shard.urls)):
            for key in self._keys.pop(RowRef(shard, row), ()):
                del self._open[key]

    def add_finished(self, shard: Shard) -> None:
        """Add the rows of a finished shard."""
        rows = np.flatnonzero(shard.status == Status.OK)
        number = len(self._paths)
        self._paths.append((shard.path, cache_of(shard.layout)))
        self._images.add(shard.sha256[rows, :8].copy().view("<u8")[:, 0], number, rows)
        all_urls = shard.urls()
        urls = {row: _short(url) for row in rows.tolist() if is_address(url := all_urls[row])}
        self._urls.add(np.array([*urls.values()], np.uint64), number, np.array([*urls]))

    def _stored(self, key: Key, cache: Cache) -> Iterator[StoredRow]:
        table = self._urls if isinstance(key, str) else self._images
        for number, row in table.find(_short(key)):
            path, of = self._paths[number]
            if of != cache:
                continue
            try:
                shard = self._shard(path)
                stored_key = shard.url(row) if isinstance(key, str) else shard.sha256[row].tobytes()
            except (LlavaError, OSError):  # deleted in the meantime
                continue
            if stored_key == key and shard.check(row):
                yield StoredRow(shard, row)


class _KeyTable:
    """Short keys of the rows of finished shards, in sorted parts, each more than twice as large as the next.

    So the keys of N shards are sorted log N times at most, not N times.
    """

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, keys: np.ndarray, shard: int, rows: np.ndarray) -> None:
        part = np.stack([keys, (np.uint64(shard) << np.uint64(32)) | rows.astype(np.uint64)])
        larger = self._parts.copy()
        while larger and larger[-1].shape[1] <= 2 * part.shape[1]:
            part = np.concatenate([larger.pop(), part], axis=1)
        self._parts = [*larger, part[:, np.argsort(part[0], kind="stable")]]  # at once: threads read it

    def find(self, key: int) -> list[tuple[int, int]]:
        """(shard, row) of the rows with this short key."""
        places: list[int] = []
        for part in self._parts:
            begin, end = (np.searchsorted(part[0], np.uint64(key), side) for side in ("left", "right"))
            places += part[1, begin:end].tolist()
        return [(place >> 32, place & 0xFFFFFFFF) for place in places]


def _short(key: Key) -> int:
    """First 8 bytes of a sha256, or 8 bytes of an address's hash."""
    if isinstance(key, str):
        key = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(key[:8], "little")
