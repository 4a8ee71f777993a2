"""Parquet files with images at addresses, in files, or in the parquet file itself."""

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

from extract.sources.base import Columns, Images, Source, captions_of, is_address
from extract.sources.conversations import conversation_text
from extract.sources.local_images import LocalImages, local_images
from extract.sources.parquet_images import ParquetImages
from llava_core.errors import LlavaError, first_line

CAPTION_KEY = "global_caption"
"""The caption in SA1B-Dense-Caption's `cap_seg`."""
IMAGE_REFS = ("url", "image", "path")
"""Columns of addresses or paths, the preferred first; a column `image` of bytes precedes all."""
CONVERSATIONS = ("conversations", "messages")
TEXTS = ("cap_seg", "caption", "text", *CONVERSATIONS)
"""Columns of text, the preferred first."""


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """Rows of a parquet file, or its first `rows` rows."""

    @classmethod
    def find(cls, path: Path, images: Path) -> Parquet:
        """Raises LlavaError unless the file has a column of images and one of text."""
        file = _open(path)
        _image_leaves(path, file.schema_arrow)
        _text_column(path, file.schema_arrow)
        return cls(path, file.metadata.num_rows, images)

    def read(self) -> Columns:
        file = _open(self.path)
        names = file.schema_arrow.names
        ref, stored = _image_leaves(self.path, file.schema_arrow)
        text = _text_column(self.path, file.schema_arrow)
        wanted = [ref, text, *{"id"}.intersection(names)]
        try:
            table = file.read(columns=[name for name in wanted if name]).slice(0, self.rows)
        except (pa.ArrowException, OSError) as error:
            raise LlavaError(f"damaged parquet file {self.path}", got=error, do="download it again") from None
        image_refs = [str(v or "") for v in _texts(_leaf(table, ref))] if ref else [""] * self.rows
        return Columns(
            image_refs=image_refs,
            captions=self._captions(table[text], text),
            ids=[str(i) for i in (_texts(table["id"]) if "id" in names else range(self.rows))],
            images=self._images(ref, stored, image_refs),
            conversations=text in CONVERSATIONS,
        )

    def _captions(self, column: Any, name: str) -> list[str | None]:
        if name in CONVERSATIONS:
            dialogues = enumerate(column.to_pylist())
            return [conversation_text(dialogue, f"{self.path}, row {row}") for row, dialogue in dialogues]
        return captions_of(_dense_captions(column) if name == "cap_seg" else _texts(column))

    def _images(self, ref: str | None, stored: str | None, image_refs: list[str]) -> Images | None:
        if stored:
            return ParquetImages(self.path, stored, LocalImages(self.images, image_refs))
        # In a column of addresses, anything else is a broken address, not a path.
        if ref == "url" and (any(map(is_address, image_refs)) or not any(image_refs)):
            return None
        return local_images(self.path, self.images, image_refs)


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise LlavaError(
            f"{path} is not a readable parquet file", got=first_line(error), do="download it again"
        ) from None


def _image_leaves(path: Path, schema: Any) -> tuple[str | None, str | None]:
    """Column, or field of a struct, of the images' addresses or paths, and of their bytes."""
    _require_once(path, schema, IMAGE_REFS)
    if "image" in schema.names:
        kind = schema.field("image").type
        if _is_bytes(kind):
            return None, "image"
        if pa.types.is_struct(kind):
            fields = {field.name: field.type for field in kind}
            ref = "image.path" if "path" in fields else None
            stored = "image.bytes" if _is_bytes(fields.get("bytes", pa.null())) else None
            if ref or stored:
                return ref, stored
    found = [name for name in IMAGE_REFS if name in schema.names]
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
    """The column's values, bytes decoded as UTF-8 with errors replaced."""
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
