"""Rows of a table as text, in the order of the file: JSON lines, a JSON list, CSV or TSV, gzip or not."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from llava_core.errors import LlavaError, first_line

GZIP = b"\x1f\x8b"
LINE = 1 << 24
"""Most bytes of the line by which JSON lines are recognised."""
BLOCK = 1 << 16
"""Characters of a JSON list that are read at once, at least."""
NO_TEXT = (OSError, EOFError, zlib.error, UnicodeDecodeError)
"""What reading a damaged gzip file, or other bytes than UTF-8, raises."""
_COMMA = re.compile(r"\s*,\s*")
Row = dict[str, Any]


def opened(path: Path) -> Any:
    """The bytes of a file, decompressed."""
    with path.open("rb") as file:
        compressed = file.read(len(GZIP)) == GZIP
    return gzip.open(path, "rb") if compressed else path.open("rb")


def first_rows(path: Path, is_csv: bool, rows: int) -> list[Row] | None:
    """The first rows; the file is not read much further.

    None where only the whole file tells them: if it has fewer, is damaged before, or is no UTF-8.
    """
    if not is_csv and has_json_lines(path):
        found = list(itertools.islice(json_lines(path), rows))
        return found if len(found) == rows else None
    with contextlib.suppress(*NO_TEXT, RecursionError), opened(path) as file:
        if b"\0" in file.read(4096):
            return None
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        found = list(itertools.islice(csv_rows(path, text) if is_csv else _items(text), rows))
        return found if len(found) == rows else None
    return None


def has_json_lines(path: Path) -> bool:
    """Whether the first line is a whole object."""
    with contextlib.suppress(*NO_TEXT, ValueError, RecursionError), opened(path) as file:
        return isinstance(json.loads(file.readline(LINE)), dict)
    return False


def json_lines(path: Path) -> Iterator[Row]:
    """Objects of JSON lines; blank lines are no rows. Raises LlavaError at a line that is no object."""
    try:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _object(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        again = "download it again"
        raise LlavaError(f"{path} is a damaged gzip file", got=first_line(error), do=again) from None


def _object(line: bytes, where: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{where} is not JSON", got=first_line(error)) from None
    if not isinstance(found, dict):
        raise LlavaError(where, expected="an object", got=type(found).__name__)
    return found


def _items(file: TextIO) -> Iterator[Row]:
    """Objects of a JSON list; ends at its end, or before anything that is no object."""
    decoder = json.JSONDecoder()
    text, at = file.read(BLOCK).lstrip(), 1
    if not text.startswith("["):
        return
    text = text[:1] + text[1:].lstrip()
    while True:
        try:
            item, end = decoder.raw_decode(text, at)
            comma = _COMMA.match(text, end)
        except json.JSONDecodeError:
            item = comma = None
        if comma is None or comma.end() == len(text):
            if not (more := file.read(max(BLOCK, len(text)))):  # twice as much, for items of any size
                return
            text, at = text[at:] + more, 0
        elif isinstance(item, dict):
            yield item
            at = comma.end()
        else:
            return


def csv_rows(path: Path, file: TextIO) -> Iterator[Row]:
    """Rows under a header. Raises LlavaError for a row of more fields than the header."""
    first = file.readline()
    file.seek(0)
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    separator = "\t" if tabs else max(",\t;", key=first.count)
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(file, delimiter=separator, strict=True)
    try:
        require_once(path, rows.fieldnames or ())
        for row in rows:
            if None in row:
                wanted = len(rows.fieldnames or ())
                got = wanted + len(row[None])
                raise LlavaError(f"{path}, line {rows.line_num}", expected=f"{wanted} fields", got=got)
            yield row
    except csv.Error as error:
        do = "close the quotes, and double those inside a text"
        raise LlavaError(f"{path}, line {rows.line_num} is no CSV", got=error, do=do) from None


def require_once(path: Path, names: Any) -> None:
    """Raise LlavaError if two columns have one name."""
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise LlavaError(f"{path} has more than one column {twice!r}", do="drop all but one")
