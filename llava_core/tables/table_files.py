"""Files of rows and columns, recognised by their content: parquet, Arrow, JSON, JSON lines, CSV and TSV."""

from __future__ import annotations

import abc
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.cli.console import say_once
from llava_core.errors import LlavaError, first_line
from llava_core.tables.text_rows import GZIP, csv_rows, first_rows, require_once

AS_TEXT = (".json", ".jsonl", ".csv", ".tsv", ".json.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz")
"""Suffixes of tables that are text, in lower case."""
AGAIN = "download it again"
UNPACK = "unpack it, and give its folder"
FOREIGN = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run `git lfs pull` there"),
    b"PARE": ("an encrypted parquet file", "write it again without encryption"),
    b"Rar!": ("a RAR archive", UNPACK),
    b"PK\x03\x04": ("a ZIP archive", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it"),
    b"BZh": ("compressed by bzip2", "decompress it"),
    b"\x89HDF": ("an HDF5 file", "give what the shards were made from"),
    b"SQLite format 3": ("an SQLite database", "export its table as parquet or CSV"),
    b"<": ("an HTML or XML page, as failed downloads leave", AGAIN),
}
"""First bytes of files that are no table: what they are, and what to do."""
NAMES_TOO = (b"PARE", b"BZh", b"<")
"""Those of them that the name of a CSV's first column may begin with."""


class DamagedTable(LlavaError):
    """A file whose columns are known, but not their values."""


class Table(abc.ABC):
    """Rows and columns. A column may be a field of another one, of structs or lists of them: `image.path`."""

    def __init__(self, path: Path, names: Sequence[str], rows: int) -> None:
        self.path, self.names, self.rows = path, list(names), rows

    @abc.abstractmethod
    def values(self, name: str, rows: int) -> list[Any]:
        """The first `rows` values of a column; text that is no UTF-8 is bytes."""

    @abc.abstractmethod
    def kind(self, name: str) -> Any:
        """Arrow type of a column; None where the file declares none."""


class ArrowTable(Table):
    """Columns that Arrow reads."""

    def __init__(self, path: Path, schema: Any, rows: int, read: Callable[[str, str, int], Any]) -> None:
        """`read` gives the first rows of a column, of which only one field is needed if that is named."""
        require_once(path, schema.names)
        super().__init__(path, schema.names, rows)
        self._schema, self._read = schema, read

    def kind(self, name: str) -> Any:
        column, field = self._parts(name)
        kind = self._schema.field(column).type
        return _only_field(kind, field) if field else kind

    def _parts(self, name: str) -> tuple[str, str]:
        """Column and field."""
        return (name, "") if name in self.names else name.rpartition(".")[::2]

    def values(self, name: str, rows: int) -> list[Any]:
        column, field = self._parts(name)
        try:
            found = self._read(column, field, rows)
        except (pa.ArrowException, OSError) as error:
            raise DamagedTable(f"damaged file {self.path}", got=first_line(error), do=AGAIN) from None
        try:
            if field:
                found = found.cast(_only_field(found.type, field))
            return list(_without_codec(found).to_pylist())
        except (
            ValueError,
            OverflowError,
        ):  # a time that Python has not, or text that is no UTF-8 inside a list or struct
            try:
                return list(found.cast(pa.large_string()).to_pylist())
            except (pa.ArrowException, ValueError) as error:
                raise LlavaError(f"{self.path}: column {name!r} cannot be read", got=error) from None

    def column(self, name: str) -> Any:
        """A column as Arrow has it."""
        return self._read(name, "", self.rows)


class ParquetTable(ArrowTable):
    def __init__(self, path: Path) -> None:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            what = f"{path} is not a readable parquet file"
            raise LlavaError(what, got=first_line(error), do=AGAIN) from None
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]

        def read(column: str, field: str, rows: int) -> Any:
            names = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(f".{field}")]
            names = names if field else [column]
            if rows >= file.metadata.num_rows:
                return file.read(columns=names)[column]
            found = list(_first(file.iter_batches(min(rows, 1 << 16), columns=names), rows))
            table = pa.Table.from_batches(found).slice(0, rows) if found else file.read(columns=names)
            return table[column]

        super().__init__(path, file.schema_arrow, file.metadata.num_rows, read)


def _first(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    while rows > 0 and (batch := next(batches, None)) is not None:
        rows -= len(batch)
        yield batch


def _arrow_file(path: Path) -> ArrowTable:
    """An Arrow file or stream, as `datasets.save_to_disk` writes it; it stays on disk."""
    try:
        source = pa.memory_map(str(path))
        stream = source.read(6) != b"ARROW1"
        source.seek(0)
        table = (pa.ipc.open_stream if stream else pa.ipc.open_file)(source).read_all()
    except (pa.ArrowException, OSError) as error:
        what = f"{path} is not a readable Arrow file"
        raise LlavaError(what, got=first_line(error), do=AGAIN) from None
    return ArrowTable(path, table.schema, len(table), lambda name, _, rows: table[name].slice(0, rows))


class RowTable(Table):
    """Rows of JSON or CSV, in memory."""

    def __init__(self, path: Path, entries: list[dict[str, Any]]) -> None:
        names = list(dict.fromkeys(itertools.chain.from_iterable(entries)))
        super().__init__(path, names, len(entries))
        self.entries = entries

    def kind(self, name: str) -> Any:
        return None

    def values(self, name: str, rows: int) -> list[Any]:
        return [entry.get(name) for entry in self.entries[:rows]]


def open_table(path: Path, rows: int | None = None) -> Table:
    """Open a file by its content; a table as text may end after the first `rows` rows.

    Raises LlavaError, which names what it is, for anything but a table.
    """
    with path.open("rb") as file:
        head = file.read(512)
    for magic, (what, do) in FOREIGN.items():
        if head.startswith(magic) and not (magic in NAMES_TOO and _is_csv(path)):
            raise LlavaError(f"{path} is {what}", do=do)
    if head.startswith(b"PAR1"):
        return ParquetTable(path)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow_file(path)
    if rows is not None and (entries := first_rows(path, _is_csv(path), rows)) is not None:
        return RowTable(path, entries)
    text, name = _text(path, head), path.name.lower().removesuffix(".gz")
    first = text.lstrip()[:1]
    if _is_csv(path):
        return RowTable(path, list(csv_rows(path, io.StringIO(text, newline=""))))
    if first in ("[", "{"):
        return RowTable(path, _json_entries(path, text))
    if not first and name.endswith((".json", ".jsonl")):
        return RowTable(path, [])
    if name.endswith((".json", ".jsonl")):
        raise LlavaError(f"{path} is not JSON", expected="a list, or lines, of objects", got=repr(text[:20]))
    kinds = "parquet, Arrow, JSON, CSV or TSV (*.csv, *.tsv)"
    raise LlavaError(f"{path} is no table", expected=kinds, got=f"begins with {head[:12]!r}")


def _is_csv(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".txt"))


def _text(path: Path, head: bytes) -> str:
    """Text of a file, decompressed. Raises LlavaError for binary files."""
    data = path.read_bytes()
    if head.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise LlavaError(f"{path} is a damaged gzip file", got=first_line(error)) from None
        if data[257:262] == b"ustar":
            raise LlavaError(f"{path} is a compressed tar archive", do="decompress it by `gunzip`")
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in data[:4096] and not wide:
        kinds = "parquet, Arrow, JSON, JSON lines, CSV, TSV or tar"
        raise LlavaError(f"{path} is no table", expected=kinds, got=f"begins with {head[:12]!r}")
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if _is_csv(path):  # as spreadsheets in China write them
            try:
                text = data.decode("gb18030")
            except UnicodeDecodeError as second:
                raise LlavaError(f"{path} is neither UTF-8 nor GB 18030", got=second) from None
            say_once(f"{path} is not UTF-8; it is read as GB 18030")
            return text
        raise LlavaError(f"{path} is not UTF-8", got=error) from None


def _json_entries(path: Path, text: str) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of JSON lines. Blank lines are no rows."""
    entries: Any
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not (isinstance(error, json.JSONDecodeError) and text.lstrip().startswith("{")):
            raise LlavaError(f"{path} is not JSON", got=first_line(error)) from None
        lines = enumerate(io.StringIO(text), 1)
        entries = [_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if isinstance(entries, dict):
        if ".jsonl" not in path.name.lower():
            expected = "[{image, …}, …], or lines of {image, …}"
            got = f"an object of {', '.join(list(entries)[:6]) or 'nothing'}"
            raise LlavaError(f"{path} is not a JSON list", expected=expected, got=got)
        entries = [entries]
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise LlavaError(f"{path}, row {row}", expected="an object", got=_json_type(entry))
    return list(entries)


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LlavaError(f"{where} is not JSON", got=first_line(error)) from None


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _only_field(kind: Any, name: str) -> Any:
    """A type of structs, or of lists of them, with only one field; its text as bytes."""
    if pa.types.is_struct(kind):
        own = kind.field(name).type
        text = pa.types.is_string(own) or pa.types.is_large_string(own)
        return pa.struct([(name, pa.large_binary() if text else own)])
    inner = _only_field(kind.value_type, name)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inner, kind.list_size)
    return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner)


def _without_codec(column: Any) -> Any:
    """Text as bytes, so that a value that is no UTF-8 does not stop the rest."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_binary())
    return column
