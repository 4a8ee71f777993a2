"""Reading a finished feature shard: features, texts and per-row columns of one source file.

Row i of the shard is row i of the source. Rows are read by `pread`, which threads and forked processes may
call on one file at a time.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.errors import LlavaError
from llava_core.row_status import Failure, Status
from llava_core.shards import file_checksums
from llava_core.shards.byte_offsets import COLUMNS, REASON_BYTES, columns
from llava_core.shards.dialogue import SYSTEM_START, Dialogue, Turns, stored_dialogue
from llava_core.shards.file_checksums import REDO
from llava_core.shards.hdf5_file import TEXTS, read_layout
from llava_core.shards.quantize import FEATURE_TYPE, checksum

OPEN_FILES = max(1, min(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Shards whose files a process keeps open between reads, at most."""


class OpenFile:
    """A file opened for reading, closed with the last reference to it: never while a thread reads it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)


AT_ONCE = 1 << 15
"""Rows whose texts are in memory together, where all are read."""
SPACE_BEGINS = np.isin(np.arange(256), [*range(9, 14), *range(28, 33), 0xC2, 0xE1, 0xE2, 0xE3])
"""First bytes of the characters that `str.strip` takes away, in UTF-8; other characters have them, too."""
_kept: collections.deque[OpenFile] = collections.deque(maxlen=OPEN_FILES)
"""The files opened last; one that drops out is closed, and opened again by the next read of its shard."""


def reason_text(stored: bytes) -> str:
    """A reason as text; what cannot be printed, or was cut in the middle of a character, is left out."""
    return "".join(filter(str.isprintable, stored.rstrip(b"\0").decode("utf-8", "ignore")))


def _column(name: str) -> Any:
    """A column that is read when it is first used: all together take more memory than what training holds."""
    kind, shape = COLUMNS[name]
    return functools.cached_property(lambda shard: shard._array(name, kind).reshape(shard.rows, *shape))


class Shard:
    """A finished shard, opened strictly: features and texts are read row by row, most columns at first use.

    Columns are arrays of all rows: `status`, `checksums`, `http`, `attempts`, `nbytes`, `orig_hw`, `sha256`.
    A row's features are compared with their checksum when they are first read since the file was opened.
    """

    status: np.ndarray
    checksums: np.ndarray
    http: np.ndarray = _column("http")
    attempts: np.ndarray = _column("attempts")
    nbytes: np.ndarray = _column("nbytes")
    orig_hw: np.ndarray = _column("orig_hw")
    sha256: np.ndarray = _column("sha256")

    def __init__(self, path: Path) -> None:
        self.path = path
        layout = read_layout(path)
        self.layout = layout
        self.rows, self.tokens, self.width = layout.rows, layout.tokens, layout.width
        self.row_bytes = layout.row_bytes
        self.encoder, self.preprocess, self.source = layout.encoder, layout.preprocess, layout.source
        self.identity = layout.identity
        self.conversations, self.local = layout.text == "conversation", layout.images == "local"
        self._opened: weakref.ref[OpenFile] | None = None
        held = {name: self._array(name, kind) for name, (kind, _) in columns(layout.version).items()}
        file = self._file()
        head = os.pread(file.descriptor, file_checksums.USER_BLOCK_BYTES, 0)
        recorded = np.frombuffer(head, file_checksums.NUMBER)[file_checksums.COLUMNS]
        if layout.version > 1 and checksum([*held.values(), *layout.mtime(file.descriptor)]) != recorded:
            raise LlavaError(f"damaged shard {path}", got="other outcomes of its rows", do=REDO)
        self.status, self.checksums = held["status"], held[layout.checksum]
        for name in TEXTS:
            ends = self._offsets(name)
            if ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] != layout.sizes[f"{name}_bytes"]:
                raise LlavaError(f"damaged shard {path}", got=f"{name}_offsets out of order", do=REDO)
        self._ends = {"caption": self._offsets("caption")}
        """Where each row's texts end in the file; for others than captions from when they are first used."""
        if unknown := set(np.unique(self.status).tolist()) - set(Status):
            raise LlavaError(f"damaged shard {path}", got=f"status {min(unknown)}", do=REDO)

    @property
    def uids(self) -> list[str]:  # of the files that it is read from
        return [self.layout.uid]

    @functools.cached_property
    def mtime(self) -> np.ndarray:
        """When each row's image file was last modified, in ns since 1970; 0 for what came from no file."""
        file = self._file()
        found = self.layout.mtime(file.descriptor)
        return found[0] if found else np.zeros(self.rows, "<i8")

    def read_into(self, row: int, out: np.ndarray) -> None:
        """Read features of `row` into `out`, C-contiguous fp16 [T, D]. Raises LlavaError if damaged."""
        file = self._file()
        recorded = None if self._checked[row] else int(self.checksums[row])
        self.layout.read_into(file.descriptor, row, out, recorded)
        self._checked[row] = True

    def read(self, row: int) -> np.ndarray:
        """Features of `row`: fp16 [T, D]. Raises LlavaError if they are damaged."""
        out = np.empty((self.tokens, self.width), FEATURE_TYPE)
        self.read_into(row, out)
        return out

    def ok_rows(self) -> list[int]:
        """The rows that have features, ascending."""
        rows: list[int] = np.flatnonzero(self.status == Status.OK).tolist()
        return rows

    def failed(self, failures: Iterable[Failure]) -> np.ndarray:
        """Which rows have one of these failures, bool [N]; for `damaged`, reads every row."""
        mask = np.zeros(self.rows, bool)
        for failure in failures:
            mask |= failure.mask(self.status, self.http)
            if failure.status is Status.DAMAGED:
                mask[[row for row in self.ok_rows() if not self.check(row)]] = True
        return mask

    def check(self, row: int) -> bool:
        """Whether features and thumbnail of a row that is ok still have their checksums."""
        file = self._file()
        return self.layout.is_whole(file.descriptor, row, int(self.checksums[row]))

    def checksum(self, row: int) -> int:
        """Checksum of the features of `row` as they are on disk now."""
        file = self._file()
        return self.layout.row_checksum(file.descriptor, row)

    def thumbnail(self, row: int) -> bytes | None:
        """Small JPEG of `row`; None if there is none or the row failed. Raises LlavaError if damaged."""
        if self.status[row] != Status.OK:
            return None
        file = self._file()
        return self.layout.read_thumbnail(file.descriptor, row)

    @property
    def reason(self) -> np.ndarray:
        """Why each row failed, in words, or what an ok row lacks: bytes [N], UTF-8; read anew each time.

        Empty where there is nothing to say, and in shards of format versions 1 and 2.
        """
        kind = f"|S{REASON_BYTES}"
        return self._array("reason", kind) if "reason" in self.layout.offsets else np.zeros(self.rows, kind)

    def reason_of(self, row: int) -> str:
        """One row's `reason`; reads nothing else."""
        if "reason" not in self.layout.offsets:
            return ""
        offset = self.layout.offsets["reason"] + REASON_BYTES * row
        file = self._file()
        return reason_text(os.pread(file.descriptor, REASON_BYTES, offset))

    def picture_row(self, row: int) -> int:
        """The row of the file that has the picture of `row`: itself, unless --text gives other words."""
        return row

    def caption(self, row: int) -> str:
        return self._text("caption", row)

    def caption_bytes(self, row: int) -> int:
        """Bytes of the caption, or dialogue, as stored; reads nothing."""
        ends = self._ends["caption"]
        return int(ends[row + 1] - ends[row])

    def worded(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a range have words, and which a system message before them: two bool [rows].

        Raises LlavaError if the words of one are damaged.
        """
        data, starts, sizes = self._captions(start, stop)
        beginnings = np.frombuffer(data + b"\0", np.uint8)[starts]
        worded = sizes > 0
        try:
            data.decode()
        except UnicodeDecodeError:
            for row in range(start, stop):
                self.caption(row)  # raises at the one
        for row in np.flatnonzero(worded & SPACE_BEGINS[beginnings]).tolist():
            worded[row] = bool(self.caption(start + row).strip())
        told = np.zeros(len(sizes), bool)
        if self.conversations:
            for row in np.flatnonzero(sizes > len(SYSTEM_START)).tolist():
                told[row] = data.startswith(SYSTEM_START.encode(), int(starts[row]))
        return worded, told

    def caption_characters(self, start: int, stop: int) -> np.ndarray:
        """Characters of the captions of a range of rows, int [rows]; 0 for one of spaces alone."""
        data, starts, sizes = self._captions(start, stop)
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80  # the other bytes go on with a character
        upto = np.concatenate([[0], np.cumsum(begins, dtype=np.int64)])
        worded, _ = self.worded(start, stop)
        return np.where(worded, upto[starts + sizes] - upto[starts], 0)

    def _captions(self, start: int, stop: int) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Bytes of the captions of a range of rows, and where each begins in them and how many it has."""
        ends = self._ends["caption"][start : stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        file = self._file()
        data = os.pread(file.descriptor, last - first, self.layout.offsets["caption_bytes"] + first)
        return data, ends[:-1] - first, np.diff(ends)

    def turns(self, row: int) -> Turns:
        """(question, answer) pairs; a caption is one answer, to the question None, which is drawn later."""
        return self.dialogue(row).turns

    def dialogue(self, row: int) -> Dialogue:
        """`turns`, and the system message before them, if there is one."""
        try:
            return stored_dialogue(self.caption(row), self.conversations)
        except ValueError:
            raise LlavaError(f"damaged shard {self.path}", got=f"dialogue of row {row}", do=REDO) from None

    def url(self, row: int) -> str:
        return self._text("url", row)

    def picture_keys(self, row: int) -> list[bytes | str]:
        """Keys for `shuffled_pairs.picture_numbers`: sha256 and URL of the image, those that are known.

        Local images have the sha256 alone: the same file name may stand for several images.
        """
        digest, url = self.sha256[row].tobytes(), "" if self.local else self.url(row)
        return [*([digest] if any(digest) else ()), *([url] if url else ())]

    def id(self, row: int) -> str:
        return self._text("id", row)

    def urls(self) -> list[str]:
        """The URLs of all rows, in one read."""
        return self._texts("url")

    def ids(self) -> list[str]:
        """The ids of all rows, in one read."""
        return self._texts("id")

    def captions(self) -> list[str]:
        """The captions, or dialogues as stored, of all rows, in one read."""
        return self._texts("caption")

    def _texts(self, name: str) -> list[str]:
        data, ends = self._array(f"{name}_bytes", "|u1").tobytes(), self._offsets(name).tolist()
        return [data[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(ends)]

    def _text(self, name: str, row: int) -> str:
        if name not in self._ends:
            self._ends[name] = self._offsets(name)
        start, end = map(int, self._ends[name][row : row + 2])
        file = self._file()
        data = os.pread(file.descriptor, end - start, self.layout.offsets[f"{name}_bytes"] + start)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise LlavaError(f"damaged shard {self.path}", got=f"{name} of row {row}", do=REDO) from None

    def _offsets(self, name: str) -> np.ndarray:
        return self._array(f"{name}_offsets", "<i8")

    def _array(self, name: str, kind: str) -> np.ndarray:
        file = self._file()
        data = os.pread(file.descriptor, self.layout.sizes[name], self.layout.offsets[name])
        return np.frombuffer(data, kind)

    def _file(self) -> OpenFile:
        """The shard's file, to be held by its caller while it reads."""
        file = None if self._opened is None else self._opened()
        if file is None:
            file = OpenFile(self.path)
            self._opened, self._checked = weakref.ref(file), np.zeros(self.rows, bool)
            _kept.append(file)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __del__(self) -> None:
        opened = getattr(self, "_opened", None)  # there is none if it was refused
        if opened and (file := opened()):
            with contextlib.suppress(ValueError):  # it has dropped out already
                _kept.remove(file)
