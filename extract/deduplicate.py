"""Rows that show what another row of the shard set shows: fetched once, encoded once.

A row's keys are its address and the sha256 of its image file. The rows of open shards are kept in a dict; of
finished shards 16 bytes per row and key are kept, and the shard itself says whether a hit is one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from extract.open_shard import Filling
from extract.sources.base import is_address
from llava_core.errors import LlavaError
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord

Key = str | bytes
Place = tuple[Filling, int]
"""An open shard, and a row of it."""


@dataclasses.dataclass
class First:
    """The first row with some key, in an open shard."""

    place: Place
    record: RowRecord | None = None
    """Its outcome, without the features; None while it is on its way."""
    followers: list[tuple[Filling, RowRecord]] = dataclasses.field(default_factory=list)
    """Rows, with their shards, that take over its outcome when it comes."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A row of a finished shard."""

    shard: Shard
    row: int

    def recall(self) -> RowRecord:
        """Its outcome, features included."""
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
            thumbnail=shard.thumbnail(row),
        )


class Duplicates:
    """What the rows so far have shown. `claim` may be called from any thread."""

    def __init__(self) -> None:
        self._open: dict[Key, First] = {}
        self._keys: dict[Place, list[Key]] = {}
        self._urls, self._images = _Finished(), _Finished()
        self._paths: list[Path] = []

    def claim(self, key: Key, place: Place) -> First | Known | None:
        """The row that shows the same; None if there is none, and then `place` is the first from now on."""
        if known := next(self._known(key), None):
            return known
        first = self._open.setdefault(key, First(place))
        if first.place != place:
            return first
        self._keys.setdefault(place, []).append(key)
        return None

    def settle(self, place: Place, record: RowRecord) -> list[tuple[Filling, RowRecord]]:
        """The outcome of a row is known; returns its followers."""
        followers: list[tuple[Filling, RowRecord]] = []
        for key in self._keys.get(place, ()):
            first = self._open[key]
            first.record = dataclasses.replace(record, features=None, thumbnail=None)
            followers += first.followers
            first.followers = []
        return followers

    def finished(self, shard: Shard, opened: Filling | None = None) -> None:
        """A shard is finished, the one that was `opened` or one of an earlier run."""
        rows = np.flatnonzero(shard.status == Status.OK)
        number = len(self._paths)
        self._paths.append(shard.path)
        self._images.add(shard.sha256[rows, :8].copy().view("<u8")[:, 0], number, rows)
        all_urls = shard.urls()
        urls = {row: _short(url) for row in rows.tolist() if is_address(url := all_urls[row])}
        self._urls.add(np.array([*urls.values()], np.uint64), number, np.array([*urls]))
        if opened is not None:
            for row in range(shard.rows):
                for key in self._keys.pop((opened, row), ()):
                    del self._open[key]

    def _known(self, key: Key) -> Iterator[Known]:
        index = self._urls if isinstance(key, str) else self._images
        for number, row in index.find(_short(key)):
            try:
                shard = _open_shard(self._paths[number])
                there = shard.url(row) if isinstance(key, str) else shard.sha256[row].tobytes()
            except (LlavaError, OSError):  # deleted since: then it is no duplicate any more
                continue
            if there == key and shard.check(row):
                yield Known(shard, row)


class _Finished:
    """Short keys of the rows of finished shards, sorted."""

    def __init__(self) -> None:
        self._table = np.zeros((2, 0), np.uint64)

    def add(self, keys: np.ndarray, shard: int, rows: np.ndarray) -> None:
        places = (np.uint64(shard) << np.uint64(32)) | rows.astype(np.uint64)
        table = np.concatenate([self._table, np.stack([keys, places])], axis=1)
        self._table = table[:, np.argsort(table[0], kind="stable")]  # replaced at once: threads read it

    def find(self, key: int) -> list[tuple[int, int]]:
        """(shard, row) of the rows with this short key."""
        table = self._table
        begin, end = (np.searchsorted(table[0], np.uint64(key), side) for side in ("left", "right"))
        return [(place >> 32, place & 0xFFFFFFFF) for place in table[1, begin:end].tolist()]


def _short(key: Key) -> int:
    """8 bytes that tell most keys apart."""
    if isinstance(key, str):
        key = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(key[:8], "little")


@functools.lru_cache(maxsize=64)
def _open_shard(path: Path) -> Shard:
    return Shard(path)
