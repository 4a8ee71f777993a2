"""Rows of a table, some at a time: what does not fit in memory is never read whole, but for a JSON list."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.errors import LlavaError, first_line
from llava_core.tables.table_files import GZIP, open_table

ROWS = 4096
"""Rows in a batch."""
Rows = list[dict[str, Any]]


def row_batches(path: Path) -> Iterator[Rows]:
    """Rows as objects, at most ROWS at a time. Raises LlavaError as `open_table` does."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        yield from _of_parquet(path)
    elif _has_json_lines(path, head):
        yield from _of_lines(path, head)
    else:
        table = open_table(path)
        columns = {name: table.values(name, table.rows) for name in table.names}
        rows = range(table.rows)
        while part := list(itertools.islice(rows, 0, ROWS)):
            yield [{name: values[row] for name, values in columns.items()} for row in part]
            rows = rows[ROWS:]


def _of_parquet(path: Path) -> Iterator[Rows]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LlavaError(f"damaged file {path}", got=first_line(error), do="download it again") from None


def _opened(path: Path, head: bytes) -> Any:
    return gzip.open(path, "rb") if head.startswith(GZIP) else path.open("rb")


def _has_json_lines(path: Path, head: bytes) -> bool:
    """Whether the first line is a whole object."""
    with contextlib.suppress(OSError, EOFError, ValueError), _opened(path, head) as file:
        return isinstance(json.loads(file.readline(1 << 24)), dict)
    return False


def _of_lines(path: Path, head: bytes) -> Iterator[Rows]:
    with _opened(path, head) as file:
        lines = enumerate(file, 1)
        while part := _some(path, lines):
            yield [_object(line, f"{path}, line {number}") for number, line in part if line.strip()]


def _some(path: Path, lines: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    try:
        return list(itertools.islice(lines, ROWS))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LlavaError(f"{path} is a damaged gzip file", got=first_line(error)) from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{where} is not JSON", got=first_line(error)) from None
    if not isinstance(found, dict):
        raise LlavaError(where, expected="an object", got=type(found).__name__)
    return found
