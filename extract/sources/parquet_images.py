"""Images stored in a parquet file, read in small batches."""

from __future__ import annotations

import bisect
import collections
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from extract.sources.base import Images
from extract.sources.local_images import loaded
from llava_core.errors import first_line
from llava_core.network.fetch import Fetched
from llava_core.row_status import Status

BATCH_BYTES = 4_000_000
LEAST_ROWS = 16
MOST_ROWS = 1024
"""A batch is about BATCH_BYTES of images, but LEAST_ROWS to MOST_ROWS of them."""
BUFFER = 1 << 20
"""Bytes read from the file at once; without a buffer Arrow reads a row group's whole column."""


class ParquetImages:
    """Images of a column, fast when read in the order of the rows; any other order is correct but slow.

    Memory holds the last two batches and 3 to 4 times one page of the file, which Arrow needs to decode it.
    Parquet writers check a page's size only every 1024 rows, so a page may be as large as 1024 images.
    """

    def __init__(self, path: Path, column: str, others: Images) -> None:
        """`column` may be a field, `image.bytes`; `others` has the images of rows where it is null."""
        self.column, self.others = column, others
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

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        try:
            with self._lock:
                body = self._find(row).as_py()
        except OSError as error:
            return Fetched(Status.UNREADABLE_FILE, attempts=0, detail=first_line(error))
        return self.others.load(row, max_bytes) if body is None else loaded(body, max_bytes)

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
        size = next(c.total_uncompressed_size for c in columns if c.path_in_schema == self.column)
        rows = BATCH_BYTES * metadata.num_rows // max(1, size)
        batches = self._file.iter_batches(
            min(max(rows, LEAST_ROWS), MOST_ROWS), row_groups=[group], columns=[self.column]
        )
        self._coming = (self._bytes_of(batch) for batch in batches)

    def _bytes_of(self, batch: Any) -> Any:
        (column,) = batch.columns
        return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
