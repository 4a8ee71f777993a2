"""Rows of a table, some at a time: what does not fit in memory is never read whole, but for a JSON list."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.cli.console import progress
from llava_core.errors import LlavaError, first_line
from llava_core.tables.table_files import AGAIN, ArrowTable, Table, open_table
from llava_core.tables.text_rows import has_json_lines, json_lines

ROWS = 4096
"""Rows in a batch."""
Rows = list[dict[str, Any]]


def row_batches(path: Path) -> Iterator[Rows]:
    """Rows as objects, at most ROWS at a time, with a bar that counts them. Raises LlavaError as `open_table`
    does."""
    with progress(None, "rows", desc=path.name, leave=False) as bar:
        for rows in _batches(path):
            yield rows
            bar.update(len(rows))


def _batches(path: Path) -> Iterator[Rows]:
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        yield from _of_parquet(path)
    elif has_json_lines(path):
        lines = json_lines(path)
        while part := list(itertools.islice(lines, ROWS)):
            yield part
    else:
        yield from _of_table(open_table(path))


def _of_table(table: Table) -> Iterator[Rows]:
    columns = {name: table.values(name, table.rows) for name in table.names}
    rows = range(table.rows)
    while part := list(itertools.islice(rows, 0, ROWS)):
        yield [{name: values[row] for name, values in columns.items()} for row in part]
        rows = rows[ROWS:]


def _of_parquet(path: Path) -> Iterator[Rows]:
    open_table(path)  # or refuse
    try:
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            part = pa.Table.from_batches([batch])
            yield from _of_table(
                ArrowTable(path, part.schema, len(part), lambda name, *_, own=part: own[name])
            )
    except (pa.ArrowException, OSError) as error:
        raise LlavaError(f"damaged file {path}", got=first_line(error), do=AGAIN) from None
