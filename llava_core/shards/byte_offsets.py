"""Byte offsets of the datasets in a shard file, and reading rows at them by `pread`, without HDF5."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from llava_core.errors import LlavaError
from llava_core.filesystem import read_into
from llava_core.identity import EncoderIdentity
from llava_core.shards.quantize import DatasetSpecs, Storage, checksum, dataset_specs, dequantise, row_bytes
from llava_core.types import JsonDict

FORMAT_VERSION = 3
CHECKSUMS = {1: ("crc32", "<u4"), 2: ("xxh3", "<u8"), 3: ("xxh3", "<u8")}
"""Checksum of a row's features by format version: the algorithm, which names the column, and its type."""
REASON_BYTES = 64
"""Bytes of a row's reason, UTF-8; longer ones are cut."""
SLOT_BYTES = 4096
"""Bytes of a row in `thumbnails`: a JPEG, zeros, and the checksum of both, seeded with the row's number."""
THUMBNAIL_BYTES = SLOT_BYTES - 8
"""Largest JPEG, in bytes."""


def columns(version: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Per-row columns: number type and the shape of one row's value."""
    kind, number = CHECKSUMS[version]
    reason = {"reason": (f"|S{REASON_BYTES}", ())} if version > 2 else {}
    return {
        "status": ("|u1", ()),
        kind: (number, ()),
        "http": ("<u2", ()),
        "attempts": ("|u1", ()),
        "nbytes": ("<u4", ()),
        "orig_hw": ("<u4", (2,)),
        "sha256": ("|u1", (32,)),
        **reason,
    }


COLUMNS = columns(FORMAT_VERSION)


def disk_bytes(storage: Storage, tokens: int, width: int, thumbnails: bool) -> int:
    """Bytes that one row takes on disk, without its texts and columns."""
    return row_bytes(storage, tokens, width) + thumbnails * SLOT_BYTES


@dataclasses.dataclass(frozen=True)
class Layout:
    """Metadata of a shard file, and the byte offset and size of each dataset."""

    path: Path
    """The shard file, for error messages."""
    version: int
    """Format version."""
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
        """Checksum algorithm of the rows, which is also the name of the column."""
        return CHECKSUMS[self.version][0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features in the file."""
        return row_bytes(self.storage, self.tokens, self.width)

    @functools.cached_property
    def parts(self) -> DatasetSpecs:
        """See `quantize.dataset_specs`."""
        return dataset_specs(self.storage, self.tokens, self.width)

    def read_into(self, descriptor: int, row: int, out: np.ndarray, recorded: int | None = None) -> None:
        """Read features of `row` into `out`, a C-contiguous fp16 array [T, D].

        Raises LlavaError if the checksum `recorded` is given and differs from theirs.
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
        """Checksum of the features of `row` as they are on disk now."""
        return checksum(self.read_parts(descriptor, row), self.checksum)

    def is_whole(self, descriptor: int, row: int, recorded: int) -> bool:
        """Whether features and thumbnail of a row are undamaged; `recorded` is the checksum of its features.

        The row's status must be ok.
        """
        try:
            self.read_thumbnail(descriptor, row)
        except LlavaError:
            return False
        return self.row_checksum(descriptor, row) == recorded

    def damaged(self, what: str) -> LlavaError:
        """The error for a row, or a thumbnail, with another checksum than recorded."""
        folder = self.path.parent
        return LlavaError(
            f"{what} of {self.path} is damaged",
            do=f"`extract verify --out {folder}` names all such rows, "
            f"`extract retry-failed --out {folder} --status damaged --vision …` makes them again",
        )

    def read_parts(self, descriptor: int, row: int) -> tuple[np.ndarray, ...]:
        """Features of `row` as stored: one array for each of `parts`."""
        arrays = tuple(np.empty(shape, dtype) for dtype, shape in self.parts.values())
        for name, array in zip(self.parts, arrays, strict=True):
            self._read(descriptor, name, row, array)
        return arrays

    def read_thumbnail(self, descriptor: int, row: int) -> bytes | None:
        """JPEG of a row that is ok; None if the shard has none. Raises LlavaError if it is damaged."""
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
        """[the column `mtime`]; [] for shards without local images, which do not have that column."""
        if "mtime" not in self.offsets:
            return []
        column = np.empty(self.rows, "<i8")
        self._read(descriptor, "mtime", 0, column)
        return [column]

    @property
    def ranges(self) -> list[int]:
        """Byte ranges of what belongs to rows (features, thumbnails, columns), ascending, as one flat list:
        start, end, start, end."""
        apart = {*self.parts, "thumbnails", "mtime", *columns(self.version)} & self.sizes.keys()
        spans = sorted((self.offsets[name], self.offsets[name] + self.sizes[name]) for name in apart)
        return [place for span in spans for place in span]

    def _read(self, descriptor: int, name: str, row: int, out: np.ndarray) -> None:
        start = self.offsets[name] + row * out.nbytes
        read = read_into(descriptor, out.data.cast("B"), start)
        if read != out.nbytes:
            raise LlavaError(f"truncated shard {self.path}", expected=f"{out.nbytes} bytes", got=read)
