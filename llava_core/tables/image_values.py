"""Images in the values of a table: files as bytes, in a struct or list, as base64 text; or their paths."""

from __future__ import annotations

import bisect
import collections
import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.data_url import decode_base64, decode_data_url, is_data_url
from llava_core.errors import LlavaError, first_line
from llava_core.tables.conversations import decoded
from llava_core.tables.table_files import ArrowTable, ParquetTable, RowTable, Table, open_table

BATCH_BYTES = 4_000_000
LEAST_ROWS = 16
MOST_ROWS = 1024
"""A batch is about BATCH_BYTES of images, but LEAST_ROWS to MOST_ROWS of them."""
BUFFER = 1 << 20
"""Bytes read from the file at once; without a buffer Arrow reads a row group's whole column."""
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD", "Qk", "SUkqA", "TU0AK", "AAAA")
"""How base64 of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF begins."""
_BASE64 = re.compile(r"[\w+/=\s-]{64}", re.ASCII)
"""A text that is shorter, or has other characters, is a name."""
INDEX = "index"
"""Column of VLMEvalKit's tables; for an image that another row has, they have the index of that row."""


def image_bytes(value: Any) -> bytes | None:
    """The image file in a value: bytes, base64, a `data:` URL, {bytes, path}, or a list of one such.

    None if it holds no file. Raises OSError if it holds base64 that is damaged.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        if not value.startswith(b"data:") and not is_base64(value[:96].decode("ascii", "replace")):
            return value
        value = value.decode("ascii", "replace")
    return _from_base64(value.strip()) if isinstance(value, str) and is_base64(value) else None


def image_ref(value: Any) -> tuple[str, bool]:
    """Address or path in a value, "" if it holds a file alone; and whether there are several."""
    if isinstance(value, list) and len(value) > 1:
        return "", True
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        value = value.get("path") or value.get("url") or value.get("image")
        value = value.get("url") if isinstance(value, dict) else value
    value = decoded(value)
    return (value if isinstance(value, str) and not is_base64(value) else ""), False


def is_base64(text: str) -> bool:
    """Whether a text is an image in base64 or a `data:` URL."""
    start = text[:32].lstrip()
    if is_data_url(start):
        return True
    return start.startswith(BASE64_STARTS) and _BASE64.match(text.lstrip()) is not None


def _from_base64(text: str) -> bytes:
    try:
        return decode_data_url(text) if is_data_url(text) else decode_base64(text)
    except ValueError as error:
        raise OSError(f"damaged base64: {error}") from None


def value_at(table: Table, name: str) -> Callable[[int], Any]:
    """The value of a column in one row; it may raise OSError. Several threads may call it."""
    if isinstance(table, ParquetTable):
        return ParquetImages(table.path, name).value
    if isinstance(table, ArrowTable):  # on disk
        column = table.column(name)
        return lambda row: column[row].as_py()
    assert isinstance(table, RowTable)
    values = [entry.get(name) for entry in table.entries]
    if INDEX in table.names:
        stored = zip(table.entries, values, strict=True)
        indices = {str(entry.get(INDEX)): value for entry, value in stored if _is_stored(value)}
        values = [indices.get(value, value) if isinstance(value, str) else value for value in values]
    return values.__getitem__


def images_of_ids(path: Path, ids: Sequence[Any]) -> Callable[[int], Any]:
    """The image of each row by its id: from a table of columns id and image, or a folder of parquet files.

    Raises LlavaError if an id is not there, or there is no such table.
    """
    places: dict[str, tuple[Callable[[int], Any], int]] = {}
    for file in sorted(path.glob("*.parquet")) or [path]:
        table = open_table(file)
        if not {"id", "image"} <= {*table.names}:
            got = ", ".join(table.names)
            raise LlavaError(f"--images {file}", expected="a table of columns id and image", got=got)
        at = value_at(table, "image")
        names = map(_name, table.values("id", table.rows))
        places |= {name: (at, row) for row, name in enumerate(names)}
    wanted = [_name(each) for each in ids]
    if missing := next((name for name in wanted if name not in places), None):
        raise LlavaError(f"--images {path}", expected="all images of --task", got=f"none with id {missing}")

    @functools.lru_cache(512)  # any order but that of the table is slow
    def image(name: str) -> Any:
        at, row = places[name]
        return at(row)

    return lambda row: image(wanted[row])


def _name(value: Any) -> str:
    return str(decoded(value)).strip()


def _is_stored(value: Any) -> bool:
    return isinstance(value, str) and is_base64(value)


class ParquetImages:
    """A column of a parquet file, fast when read in the order of the rows; any other order is slow.

    Memory holds the last two batches and 3 to 4 times one page of the file, which Arrow needs to decode it.
    Parquet writers check a page's size only every 1024 rows, so a page may be as large as 1024 images.
    """

    def __init__(self, path: Path, column: str) -> None:
        self.column = column
        self._file: Any = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
        groups = range(self._file.metadata.num_row_groups)
        rows = [self._file.metadata.row_group(group).num_rows for group in groups]
        self._starts = [0, *itertools.accumulate(rows)]
        self._lock = threading.Lock()
        self._batches: collections.deque[tuple[int, Any]] = collections.deque(maxlen=2)
        """First row and images of the last two batches read: threads that overtake each other need both."""
        self._group = -1
        self._coming: Iterator[Any] = iter(())
        """Batches of the row group `_group`, the first row of the next one `_next`."""
        self._next = 0
        self._damaged: dict[int, int] = {}
        """Damaged row groups, and the first row of each that cannot be read."""

    def value(self, row: int) -> Any:
        """Raises OSError if the row group is damaged."""
        with self._lock:
            return self._find(row).as_py()

    def _find(self, row: int) -> Any:
        for first, images in self._batches:
            if first <= row < first + len(images):
                return images[row - first]
        group = bisect.bisect_right(self._starts, row) - 1
        if group in self._damaged and row >= self._damaged[group]:
            raise OSError("the row group is damaged")
        if group != self._group or row < self._next:
            self._begin(group)
        while self._next <= row:
            try:
                images = next(self._coming)
            except (pa.ArrowException, OSError, StopIteration) as error:
                self._damaged[group], self._group = self._next, -1
                raise OSError(first_line(error)) from None
            self._batches.append((self._next, images))
            self._next += len(images)
        first, images = self._batches[-1]
        return images[row - first]

    def _begin(self, group: int) -> None:
        self._group, self._next = group, self._starts[group]
        metadata = self._file.metadata.row_group(group)
        columns = (metadata.column(i) for i in range(metadata.num_columns))
        own = (c for c in columns if f"{c.path_in_schema}.".startswith(f"{self.column}."))
        size = sum(column.total_uncompressed_size for column in own)
        rows = BATCH_BYTES * metadata.num_rows // max(1, size)
        batches = self._file.iter_batches(
            min(max(rows, LEAST_ROWS), MOST_ROWS), row_groups=[group], columns=[self.column]
        )
        self._coming = (batch.columns[0] for batch in batches)
