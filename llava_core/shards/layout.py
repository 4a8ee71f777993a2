"""Where everything lies in a shard file, and how a row is read there: by plain system calls, without HDF5."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.shards.quantize import Storage, checksum, dequantise, parts_of, row_bytes
from llava_core.types import JsonDict

FORMAT_VERSION = 2
CHECKSUMS = {1: ("crc32", "<u4"), 2: ("xxh3", "<u8")}
"""Of a row's features, by format version: the kind, which names the column, and its number type."""
SLOT_BYTES = 4096
"""Of a row in `thumbnails`: a JPEG, zeros, and the checksum of both, its seed the row's number."""
THUMBNAIL_BYTES = SLOT_BYTES - 8
"""Most bytes of the JPEG."""


def columns(version: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Per-row columns: number type and the shape of one row's value."""
    kind, number = CHECKSUMS[version]
    return {
        "status": ("|u1", ()),
        kind: (number, ()),
        "http": ("<u2", ()),
        "attempts": ("|u1", ()),
        "nbytes": ("<u4", ()),
        "orig_hw": ("<u4", (2,)),
        "sha256": ("|u1", (32,)),
    }


COLUMNS = columns(FORMAT_VERSION)


def disk_bytes(storage: Storage, tokens: int, width: int, thumbnails: bool) -> int:
    """What one row takes of the disk, its text and columns aside."""
    return row_bytes(storage, tokens, width) + thumbnails * SLOT_BYTES


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the file says of itself, and the byte offset of each dataset in it."""

    path: Path
    """Where it was read, for errors."""
    version: int
    """Of the format."""
    rows: int
    tokens: int
    width: int
    offsets: dict[str, int]
    sizes: dict[str, int]
    """Bytes of each dataset."""
    encoder: JsonDict
    preprocess: JsonDict
    source: JsonDict
    uid: str
    storage: Storage
    text: str
    """caption or conversation: what `caption_*` holds."""
    images: str
    """address or local."""

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(self.encoder, self.preprocess)

    @property
    def thumbnails(self) -> bool:
        return "thumbnails" in self.offsets

    @property
    def checksum(self) -> str:
        """Which checksum the rows have, and the name of its column."""
        return CHECKSUMS[self.version][0]

    @property
    def row_bytes(self) -> int:
        """Bytes that the features of a row take in the file."""
        return row_bytes(self.storage, self.tokens, self.width)

    @functools.cached_property
    def parts(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Datasets that hold the features: number type, and shape of one row's share."""
        return parts_of(self.storage, self.tokens, self.width)

    def read_into(self, descriptor: int, row: int, out: np.ndarray, recorded: int | None = None) -> None:
        """Features of `row` into `out`, a C-contiguous fp16 array [T, D].

        Raises LlavaError if `recorded` is given and is not their checksum.
        """
        parts: tuple[np.ndarray, ...] = (out,)
        if self.storage == "float16":
            self._read(descriptor, "features", row, out)
        else:
            parts = quantised, scales = self.read_parts(descriptor, row)
            dequantise(quantised, scales, out)
        if recorded is not None and checksum(parts, self.checksum) != recorded:
            raise self.damaged(f"row {row}")

    def row_checksum(self, descriptor: int, row: int) -> int:
        """Of the features of `row` as they lie on disk now."""
        return checksum(self.read_parts(descriptor, row), self.checksum)

    def is_whole(self, descriptor: int, row: int, recorded: int) -> bool:
        """Whether a row that is ok has its features, of this checksum, and its thumbnail as written."""
        try:
            self.read_thumbnail(descriptor, row)
        except LlavaError:
            return False
        return self.row_checksum(descriptor, row) == recorded

    def damaged(self, what: str) -> LlavaError:
        """The error for a row, or its thumbnail, that does not have its checksum."""
        folder = self.path.parent
        return LlavaError(
            f"{what} of {self.path} is damaged",
            do=f"`extract verify --out {folder}` names all such rows, "
            f"`extract retry-failed --out {folder} --status damaged --vision …` makes them again",
        )

    def read_parts(self, descriptor: int, row: int) -> tuple[np.ndarray, ...]:
        """Features of `row` as they lie on disk: the row's share of each of `parts`."""
        arrays = tuple(np.empty(shape, dtype) for dtype, shape in self.parts.values())
        for name, array in zip(self.parts, arrays, strict=True):
            self._read(descriptor, name, row, array)
        return arrays

    def read_thumbnail(self, descriptor: int, row: int) -> bytes | None:
        """The JPEG of a row that is ok, None if there is none. Raises LlavaError if it is damaged."""
        if not self.thumbnails:
            return None
        slot = np.empty(SLOT_BYTES, np.uint8)
        self._read(descriptor, "thumbnails", row, slot)
        if self.version > 1:
            slot, recorded = slot[:THUMBNAIL_BYTES], slot[THUMBNAIL_BYTES:]
            if checksum([slot], seed=row) != int.from_bytes(recorded.tobytes(), "little"):
                raise self.damaged(f"the thumbnail of row {row}")
        return slot.tobytes().rstrip(b"\0") or None

    def mtime(self, descriptor: int) -> list[np.ndarray]:
        """The column `mtime` in a list, which is empty for shards without it: those of no local images."""
        if "mtime" not in self.offsets:
            return []
        column = np.empty(self.rows, "<i8")
        self._read(descriptor, "mtime", 0, column)
        return [column]

    @property
    def ranges(self) -> list[int]:
        """Starts and ends of what rows are written to: their features, thumbnails and columns."""
        apart = {*self.parts, "thumbnails", "mtime", *columns(self.version)} & self.sizes.keys()
        spans = sorted((self.offsets[name], self.offsets[name] + self.sizes[name]) for name in apart)
        return [place for span in spans for place in span]

    def _read(self, descriptor: int, name: str, row: int, out: np.ndarray) -> None:
        start = self.offsets[name] + row * out.nbytes
        read = os.preadv(descriptor, [out.data.cast("B")], start)
        if read != out.nbytes:
            raise LlavaError(f"truncated shard {self.path}", expected=f"{out.nbytes} bytes", got=read)
