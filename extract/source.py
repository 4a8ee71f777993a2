"""Parquet files as rows to extract: an address and a caption each."""

from __future__ import annotations

import ast
import dataclasses
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict, sha256_files

CAPTION_KEY = "global_caption"
"""The caption in SA1B-Dense-Caption's `cap_seg`."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One parquet file, or the first rows of it."""

    path: Path
    rows: int

    @property
    def stem(self) -> str:
        return self.path.stem

    def identity(self) -> JsonDict:
        """name, rows and sha256: what a shard remembers of the file it was made from."""
        return {"name": self.path.name, "rows": self.rows, "sha256": sha256_files([self.path])}

    def read(self) -> Table:
        """Raises LlavaError if the file is damaged."""
        file = _open(self.path)
        names = file.schema_arrow.names
        caption = "cap_seg" if "cap_seg" in names else "caption"
        try:
            table = file.read(columns=["url", caption, *{"id"}.intersection(names)]).slice(0, self.rows)
        except (pa.ArrowException, OSError) as error:
            raise LlavaError(f"damaged parquet file {self.path}", got=error, do="download it again") from None
        ids = _texts(table["id"]) if "id" in names else range(self.rows)
        captions = _dense_captions(table[caption]) if caption == "cap_seg" else _texts(table[caption])
        return Table(
            urls=[str(url or "") for url in _texts(table["url"])],
            captions=[c.strip() if isinstance(c, str) and c.strip() else None for c in captions],
            ids=[str(i) for i in ids],
        )


@dataclasses.dataclass(frozen=True)
class Table:
    """The columns of a Source."""

    urls: list[str]
    captions: list[str | None]
    """None where no caption can be read."""
    ids: list[str]


def find_sources(data: str, limit: int | None = None) -> list[Source]:
    """The parquet files of a folder, a path or a glob, in the order of their names, cut to `limit` rows.

    Raises LlavaError if there is none, one is damaged, or two have one stem and so would share a shard.
    """
    path = Path(data)
    if path.is_dir():
        found = sorted(path.rglob("*.parquet"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(data, recursive=True))
    if not found:
        missing = not path.is_dir() and not glob.has_magic(data)
        raise LlavaError(
            f"no data at {data}" if missing else f"no parquet file in {data}",
            expected="a folder, file or glob of *.parquet",
            do="mend --data, or download the data as README.md shows",
        )
    stems: dict[str, Path] = {}
    sources: list[Source] = []
    for file in found:
        if file.stem in stems:
            raise LlavaError(
                f"{stems[file.stem]} and {file} would both become {file.stem}.h5", do="rename one of them"
            )
        stems[file.stem] = file
        rows = _open(file).metadata.num_rows
        if limit is not None:
            rows = min(rows, limit - sum(source.rows for source in sources))
        if rows:
            sources.append(Source(file, rows))
    if not sources:
        raise LlavaError(
            f"no row in {data}", expected="parquet files with rows", got=f"{len(found)} empty files"
        )
    return sources


def _open(path: Path) -> Any:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise LlavaError(
            f"{path} is not a readable parquet file", got=reason, do="download it again"
        ) from None
    names = file.schema_arrow.names
    if twice := {name for name in names if names.count(name) > 1} & {"url", "cap_seg", "caption", "id"}:
        raise LlavaError(f"{path} has more than one column {min(twice)!r}", do="drop all but one")
    if "url" not in names or not {"cap_seg", "caption"}.intersection(names):
        raise LlavaError(
            f"{path} lacks {'a caption' if 'url' in names else 'the image address'}",
            expected="columns url and cap_seg (as in SA1B-Dense-Caption) or caption (plain text)",
            got=", ".join(names) or "no column",
        )
    return file


def _dense_captions(column: Any) -> Sequence[Any]:
    kind = column.type
    if pa.types.is_struct(kind):
        if kind.get_field_index(CAPTION_KEY) < 0:
            return [None] * len(column)
        return _texts(pc.struct_field(column, CAPTION_KEY))
    return [caption_of(value) for value in _texts(column)]


def _texts(column: Any) -> list[Any]:
    """The column's values, bytes and text alike as text, whatever is not UTF-8 in them replaced."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]


def caption_of(value: object) -> str | None:
    """The caption in a `cap_seg` given as text: a JSON object or a Python dict; None if there is none."""
    if not isinstance(value, str):
        return None
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):
        try:
            loaded = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    caption = loaded.get(CAPTION_KEY) if isinstance(loaded, dict) else None
    return caption if isinstance(caption, str) else None
