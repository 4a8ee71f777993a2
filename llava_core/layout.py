"""Where everything lies in a shard file, and how a row is read there: by plain system calls, without HDF5."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.identity import EncoderIdentity
from llava_core.storage import FEATURE_TYPE, Storage, dequantise, parts_of, row_bytes

THUMBNAIL_BYTES = 4096
"""Of a row's slot in `thumbnails`: a JPEG, then zeros."""


def disk_bytes(storage: Storage, tokens: int, width: int, thumbnails: bool) -> int:
    """What one row takes of the disk, its text and columns aside."""
    return row_bytes(storage, tokens, width) + thumbnails * THUMBNAIL_BYTES


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the file says of itself, and the byte offset of each dataset in it."""

    path: Path
    """Where it was read, for errors."""
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
    def row_bytes(self) -> int:
        """Bytes that the features of a row take in the file."""
        return row_bytes(self.storage, self.tokens, self.width)

    @functools.cached_property
    def parts(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Datasets that hold the features: number type, and shape of one row's share."""
        return parts_of(self.storage, self.tokens, self.width)

    def read_into(self, descriptor: int, row: int, out: np.ndarray) -> None:
        """Features of `row` into `out`, a C-contiguous fp16 array [T, D]."""
        if self.storage == "float16":
            self._read(descriptor, "features", row, out)
        else:
            quantised, scales = self.read_parts(descriptor, row)
            dequantise(quantised, scales, out)

    def read_first(self, descriptor: int, row: int) -> np.ndarray:
        """The first token of `row`, such as CLS, without the others: fp16 [1, D]."""
        dtype, shape = self.parts["features"]
        first = np.empty((1, self.width), dtype)
        self._read(descriptor, "features", row, first, apart=int(np.prod(shape)) * dtype.itemsize)
        if self.storage == "float16":
            return first
        scales, out = np.empty(self.width, FEATURE_TYPE), np.empty((1, self.width), FEATURE_TYPE)
        self._read(descriptor, "scales", row, scales)
        dequantise(first, scales, out)
        return out

    def read_parts(self, descriptor: int, row: int) -> tuple[np.ndarray, ...]:
        """Features of `row` as they lie on disk: the row's share of each of `parts`."""
        arrays = tuple(np.empty(shape, dtype) for dtype, shape in self.parts.values())
        for name, array in zip(self.parts, arrays, strict=True):
            self._read(descriptor, name, row, array)
        return arrays

    def read_thumbnail(self, descriptor: int, row: int) -> bytes | None:
        """The JPEG of a row that is ok, None if there is none; of another row, anything."""
        if not self.thumbnails:
            return None
        slot = np.empty(THUMBNAIL_BYTES, np.uint8)
        self._read(descriptor, "thumbnails", row, slot)
        return slot.tobytes().rstrip(b"\0") or None

    def _read(self, descriptor: int, name: str, row: int, out: np.ndarray, apart: int | None = None) -> None:
        """`row` of a dataset into `out`; rows lie `apart` bytes apart, or as many as `out` takes."""
        start = self.offsets[name] + row * (apart or out.nbytes)
        read = os.preadv(descriptor, [out.data.cast("B")], start)
        if read != out.nbytes:
            raise LlavaError(f"truncated shard {self.path}", expected=f"{out.nbytes} bytes", got=read)
