"""Words apart from pictures (--text): those of tables in place of the shards' own, joined to features."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.filesystem import matching
from llava_core.row_status import Status
from llava_core.shards.dialogue import SYSTEM_START, Dialogue, stored_dialogue, turns_to_text
from llava_core.shards.reader import Shard
from llava_core.tables.column_names import IDS, NAMES_ONLY, TEXTS
from llava_core.tables.conversations import decoded, with_system
from llava_core.tables.questions import words_in
from llava_core.tables.row_batches import Rows, row_batches
from llava_core.tables.shown import shown
from llava_core.tables.words import SAMPLE, WordReader

PICTURES = ("url", "image", "path", "images", *NAMES_ONLY)
"""Columns of addresses or paths of pictures."""
EMPTY: tuple[Any, ...] = (None, "", b"", [])
"""Values that stand for none."""


def with_words(shards: Sequence[Shard], pattern: str) -> list[Shard]:
    """The same pictures with the words of the tables that `pattern` matches, any number to a picture.

    Prints how many rows join, and how many do not. Raises LlavaError if none does, or a table cannot be read.
    """
    words = Words(shards)
    for path in matching(pattern):
        words.read(path)
    return words.views()


class RewordedShard(Shard):
    """A shard whose rows are texts of other tables, in their order, each with the features of a row of it."""

    def __init__(self, base: Shard, rows: np.ndarray, store: Store, numbers: np.ndarray, words: str) -> None:
        """Text k, `numbers[k]` in the store, belongs to row `rows[k]`; `words` is a digest of all."""
        vars(self).update(vars(copy.copy(base)))
        self._base, self._places, self._store, self._numbers = base, rows, store, numbers
        self.rows, self.status, self.conversations = len(rows), base.status[rows], True
        uid = hashlib.sha256(f"{base.layout.uid} {words}".encode()).hexdigest()
        self.layout = dataclasses.replace(base.layout, uid=uid)

    def read_into(self, row: int, out: np.ndarray) -> None:
        self._base.read_into(self.picture_row(row), out)

    def picture_row(self, row: int) -> int:
        return int(self._places[row])

    def picture_keys(self, row: int) -> list[bytes | str]:
        return self._base.picture_keys(self.picture_row(row))

    def id(self, row: int) -> str:
        return self._base.id(self.picture_row(row))

    def url(self, row: int) -> str:
        return self._base.url(self.picture_row(row))

    def caption(self, row: int) -> str:
        return self._store.text(int(self._numbers[row]))

    def worded(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return np.ones(stop - start, bool), self._store.told[self._numbers[start:stop]]

    def caption_bytes(self, row: int) -> int:
        return self._store.size(int(self._numbers[row]))

    def dialogue(self, row: int) -> Dialogue:
        return stored_dialogue(self.caption(row), True)


class Store:
    """Texts on disk, in a file that is gone with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        weakref.finalize(self, self._file.close)
        self._ends = np.zeros(1, np.int64)
        self.told = np.zeros(0, bool)
        """Whether there is a system message in each."""
        self.digest = hashlib.sha256()

    def add(self, texts: Sequence[str]) -> None:
        data = [text.encode("utf-8", "replace") for text in texts]  # as a shard keeps them
        with _room():
            self._file.write(b"".join(data))
        ends = self._ends[-1] + np.cumsum([len(each) for each in data], dtype=np.int64)
        self._ends = np.concatenate([self._ends, ends])
        self.told = np.concatenate([self.told, [text.startswith(SYSTEM_START) for text in texts]])
        for each in data:
            self.digest.update(b"%d " % len(each) + each)

    def close(self) -> None:
        """No text is added any more."""
        with _room():
            self._file.flush()

    def size(self, number: int) -> int:
        return int(self._ends[number + 1] - self._ends[number])

    def text(self, number: int) -> str:
        return os.pread(self._file.fileno(), self.size(number), int(self._ends[number])).decode()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"no room for the texts of --text in {tempfile.gettempdir()}"
        raise LlavaError(what, got=error.strerror, do="set TMPDIR to a folder with more") from None


class Words:
    """Words joined so far: for each text the place of its picture among the rows of all shards."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards, self.store = shards, Store()
        self.starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self.places: list[np.ndarray] = []
        ok = [np.flatnonzero(shard.status == Status.OK) for shard in shards]
        self.ok = np.concatenate([rows + start for rows, start in zip(ok, self.starts[:-1], strict=True)])
        """Places of all rows with features."""
        if not len(self.ok):
            do = "look at the failures with `extract inspect`"
            raise LlavaError(f"no row with features in {shards[0].path.parent}, for --text to join", do=do)
        self._indices: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def read(self, path: Path) -> None:
        """Join a table's rows, and print what came of it. Raises LlavaError if none joins."""
        key = reader = None
        joined = unknown = empty = unread = twice = 0
        example = shared = None
        why = ""
        for rows in row_batches(path):
            rows = [{name.lower(): value for name, value in row.items()} for row in rows]
            if key is None or reader is None:
                key = self._key(path, rows)
                column = _column(path, rows, TEXTS, "words")
                reader = WordReader(str(path), column, [words_in(row, column) for row in rows[:SAMPLE]])
            found, ambiguous = self._find(key, rows)
            given = [words_in(row, column) for row in rows]
            words, outcomes = reader.read(given)
            texts = [
                _text_of(with_system(each, row.get("system"))) for each, row in zip(words, rows, strict=True)
            ]
            taken = [k for k, place in enumerate(found) if place >= 0 and texts[k]]
            self.store.add([texts[k] for k in taken])
            self.places.append(found[taken])
            joined, twice = joined + len(taken), twice + int(ambiguous.sum())
            missing = [k for k, place in enumerate(found) if place < 0 and not ambiguous[k]]
            unread_here = [k for k, text in enumerate(texts) if not text and given[k] not in EMPTY]
            unknown, unread = unknown + len(missing), unread + len(unread_here)
            empty += sum(not text for text in texts) - len(unread_here)
            if unread_here and not why:
                at = unread_here[0]
                why = outcomes[at].reason if at in outcomes else shown(given[at])
            if missing and example is None:
                example = _named(key, rows[missing[0]])
            if shared is None and ambiguous.any():
                shared = _named(key, rows[int(ambiguous.argmax())])
        if not joined:
            if shared is not None:
                do = "name them by shard and row, by sha256 of the image's file, or by its address or path"
                raise LlavaError(f"{path}: several images have the {key} {shown(shared)}", do=do)
            first = self._named_here(key) if key else ""
            raise LlavaError(
                f"no row of {path} belongs to an image of {self.shards[0].path.parent}",
                expected=f"{key} such as {first}" if key else "rows",
                got=shown(example) if key else "none",
                do="name its images as the extracted data did",
            )
        say(
            f"{path}: {counted(joined, 'text')} joined by {key}"
            + (f"; {unknown:,} about no image here, such as {shown(example)}" if unknown else "")
            + (f"; {twice:,} of an id that several images have, such as {shown(shared)}" if twice else "")
            + (f"; {unread:,} whose text cannot be read, such as {why}" if unread else "")
            + (f"; {empty:,} without text" if empty else "")
        )

    def views(self) -> list[Shard]:
        """Each shard with its words."""
        self.store.close()
        places = np.concatenate(self.places)
        digest = hashlib.sha256(self.store.digest.digest() + places.astype("<i8").tobytes()).hexdigest()
        shards: list[Shard] = []
        for shard, start in zip(self.shards, self.starts, strict=False):
            numbers = np.flatnonzero((places >= start) & (places < start + shard.rows))
            shards.append(RewordedShard(shard, places[numbers] - start, self.store, numbers, digest))
        said = counted(len(np.unique(places)), "picture")
        say(f"{counted(len(places), 'text')} about {said} of {len(self.ok):,}")
        return shards

    def _key(self, path: Path, rows: Rows) -> str:
        """The column, or the two, by which the rows of a table are joined."""
        names = {name for row in rows for name, value in row.items() if value not in EMPTY}
        if {"shard", "row"} <= names:
            return "shard and row"
        known = ("sha256", *PICTURES, *IDS)
        if found := next((name for name in known if name in names), None):
            return found
        raise LlavaError(
            f"{path} names no images",
            expected="a column sha256, url, image or id, or shard and row",
            got=", ".join(sorted(names)),
        )

    def _find(self, key: str, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Place of each row's picture, -1 if there is none; and which ids several pictures have."""
        hashes, places, several = self._index(key)
        names = [_named(key, row) for row in rows]
        wanted = np.array([_hash(name) for name in names], np.uint64)
        at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        found = (hashes[at] == wanted) & np.array([name != "" for name in names], bool)
        ambiguous = found & several[at]
        return np.where(found & ~ambiguous, places[at], -1), ambiguous

    def _index(self, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows with features, ordered: hash of each key, its first place, whether others have it."""
        if key not in self._indices:
            keys: list[str] = []
            for shard in self.shards:
                keys += _keys_of(shard, key)
            hashes = np.array([_hash(keys[place]) for place in self.ok.tolist()], np.uint64)
            unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
            digests = np.concatenate([shard.sha256 for shard in self.shards])[self.ok]
            others = (digests != digests[first[inverse]]).any(axis=-1)
            several = np.zeros(len(unique), bool)
            several[inverse[others]] = True
            self._indices[key] = unique, self.ok[first], several
        return self._indices[key]

    def _named_here(self, key: str) -> str:
        shard = self.shards[0]
        return shown(next(iter(_keys_of(shard, key)), ""))


def _keys_of(shard: Shard, key: str) -> list[str]:
    """The key of each row of a shard, as `_named` gives it for a row of a table."""
    by: dict[str, Callable[[], list[str]]] = {
        "shard and row": lambda: [f"{shard.path.stem} {row}" for row in range(shard.rows)],
        "sha256": lambda: [digest.tobytes().hex() for digest in shard.sha256],
        **dict.fromkeys(IDS, lambda: [name.removesuffix(".0") for name in shard.ids()]),
        **dict.fromkeys(PICTURES, shard.urls),
    }
    return by[key]()


def _named(key: str, row: dict[str, Any]) -> str:
    """How a row of a table names its picture; "" if it does not. Where a whole number may be missing, tables
    have 7.0 for the id 7."""
    if key == "shard and row":
        shard, number = (str(decoded(row.get(name))) for name in ("shard", "row"))
        return f"{shard.removesuffix('.h5')} {number.removesuffix('.0')}"
    value = row.get(key)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        (value,) = value
    text = "" if value is None else str(decoded(value)).strip()
    return text.lower() if key == "sha256" else text.removesuffix(".0") if key in IDS else text


def _text_of(words: str | Dialogue | None) -> str:
    if isinstance(words, Dialogue):
        return turns_to_text(words.turns, words.system)
    return turns_to_text(((None, words),)) if words else ""


def _column(path: Path, rows: Rows, known: Sequence[str], what: str) -> str:
    names = {name for row in rows for name, value in row.items() if value not in EMPTY}
    if found := next((name for name in known if name in names), None):
        return found
    expected = f"one of {', '.join(known[:5])}"
    raise LlavaError(f"{path} has no column of {what}", expected=expected, got=", ".join(sorted(names)))


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "replace"))
