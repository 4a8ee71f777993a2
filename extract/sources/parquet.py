"""Parquet files whose images are at addresses, in files, or in the parquet file itself."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from extract.sources.base import Images, Rows, Source, captions_of, is_address
from extract.sources.conversations import conversation_text
from extract.sources.local_images import Files, local_files
from extract.sources.parquet_images import StoredImages
from llava_core.errors import LlavaError, first_line

CAPTION_KEY = "global_caption"
"""The caption in SA1B-Dense-Caption's `cap_seg`."""
PLACES = ("url", "image", "path")
"""Columns of addresses or paths, the best first; but best of all is a column `image` of bytes."""
CONVERSATIONS = ("conversations", "messages")
TEXTS = ("cap_seg", "caption", "text", *CONVERSATIONS)
"""Columns of words, the best first."""


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """Rows of a parquet file, or the first of them."""

    @classmethod
    def find(cls, path: Path, images: Path) -> Parquet:
        """Raises LlavaError unless the file has columns to extract."""
        file = _open(path)
        _image_leaves(path, file.schema_arrow)
        _text_column(path, file.schema_arrow)
        return cls(path, file.metadata.num_rows, images)

    def read(self) -> Rows:
        file = _open(self.path)
        names = file.schema_arrow.names
        place, stored = _image_leaves(self.path, file.schema_arrow)
        text = _text_column(self.path, file.schema_arrow)
        wanted = [place, text, *{"id"}.intersection(names)]
        try:
            table = file.read(columns=[name for name in wanted if name]).slice(0, self.rows)
        except (pa.ArrowException, OSError) as error:
            raise LlavaError(f"damaged parquet file {self.path}", got=error, do="download it again") from None
        places = [str(value or "") for value in _texts(_leaf(table, place))] if place else [""] * self.rows
        return Rows(
            places=places,
            texts=self._words(table[text], text),
            ids=[str(i) for i in (_texts(table["id"]) if "id" in names else range(self.rows))],
            images=self._images(place, stored, places),
            conversations=text in CONVERSATIONS,
        )

    def _words(self, column: Any, name: str) -> list[str | None]:
        if name in CONVERSATIONS:
            dialogues = enumerate(column.to_pylist())
            return [conversation_text(dialogue, f"{self.path}, row {row}") for row, dialogue in dialogues]
        return captions_of(_dense_captions(column) if name == "cap_seg" else _texts(column))

    def _images(self, place: str | None, stored: str | None, places: list[str]) -> Images | None:
        if stored:
            return StoredImages(self.path, stored, Files(self.images, places))
        # The others are addresses gone wrong; and none at all is no path either.
        if place == "url" and (any(map(is_address, places)) or not any(places)):
            return None
        return local_files(self.path, self.images, places)


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise LlavaError(
            f"{path} is not a readable parquet file", got=first_line(error), do="download it again"
        ) from None


def _image_leaves(path: Path, schema: Any) -> tuple[str | None, str | None]:
    """Where the images' places and their bytes are, as Arrow names columns and fields in them."""
    _require_once(path, schema, PLACES)
    if "image" in schema.names:
        kind = schema.field("image").type
        if _is_bytes(kind):
            return None, "image"
        if pa.types.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            place = "image.path" if "path" in fields else None
            stored = "image.bytes" if _is_bytes(fields.get("bytes", pa.null())) else None
            if place or stored:
                return place, stored
    found = [name for name in PLACES if name in schema.names]
    if not found:
        raise _lacks(path, schema, "the image", "a column url, image (address, path or bytes) or path")
    if pa.types.is_nested(schema.field(found[0]).type):
        expected = "text, or in image also bytes or a struct of bytes and path"
        raise LlavaError(f"{path}: column {found[0]}", expected=expected, got=schema.field(found[0]).type)
    return found[0], None


def _text_column(path: Path, schema: Any) -> str:
    _require_once(path, schema, (*TEXTS, "id"))
    if not (found := [name for name in TEXTS if name in schema.names]):
        raise _lacks(path, schema, "the words", f"a column {', '.join(TEXTS[:-1])} or {TEXTS[-1]}")
    return found[0]


def _lacks(path: Path, schema: Any, what: str, expected: str) -> LlavaError:
    return LlavaError(f"{path} lacks {what}", expected=expected, got=", ".join(schema.names) or "no column")


def _require_once(path: Path, schema: Any, names: Sequence[str]) -> None:
    if twice := [name for name in names if schema.names.count(name) > 1]:
        raise LlavaError(f"{path} has more than one column {twice[0]!r}", do="drop all but one")


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _leaf(table: Any, name: str) -> Any:
    """A column, or the field of a struct: `image.path`."""
    column, *field = name.split(".")
    return pc.struct_field(table[column], field[0]) if field else table[column]


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
