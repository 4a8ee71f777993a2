"""A table as a source: which of its columns has the images, the words and the ids."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from extract.sources.base import Columns, DataFlags, Images, Source, is_address
from extract.sources.local_images import LocalImages, local_images
from extract.sources.stored_images import StoredImages
from llava_core.errors import LlavaError
from llava_core.row_status import Outcome, Status
from llava_core.shards.dialogue import Dialogue
from llava_core.tables.column_names import IDS, IMAGES, NAMES_ONLY, TEXTS
from llava_core.tables.conversations import decoded, names_media, query_messages, with_system
from llava_core.tables.image_values import image_ref, is_base64, value_at
from llava_core.tables.questions import ANSWERS, QUESTION, question_rows, turn_of
from llava_core.tables.shown import shown
from llava_core.tables.table_files import DamagedTable, Table, open_table
from llava_core.tables.words import SAMPLE, WordReader, Words

NO_IMAGES = "none"
"""--image-column of a table of text alone."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that stand for none."""


@dataclasses.dataclass(frozen=True)
class TableSource(Source):
    """Rows of a table, or its first `rows` rows."""

    @classmethod
    def find(cls, path: Path, flags: DataFlags, limit: int | None = None) -> TableSource:
        """Of a table as text, rows after `limit` may be left out.

        Raises LlavaError unless the file has images and words that can be read.
        """
        table = _opened(path, limit)
        if table.rows:
            with contextlib.suppress(DamagedTable):  # `read` raises it, when the other files are done
                _Reader(table, flags)
        return cls(path, table.rows, flags.images or path.parent, flags)

    def read(self) -> Columns:
        table = _opened(self.path, self.rows)
        if not table.rows:
            return Columns([], [], [])
        return _Reader(table, self.flags).columns(self.rows, self.images)


def _opened(path: Path, rows: int | None) -> Table:
    """A table of at least these rows and of those by which its columns are judged."""
    return open_table(path, None if rows is None else max(rows, SAMPLE))


class _Reader:
    """The chosen columns of a table."""

    def __init__(self, table: Table, flags: DataFlags) -> None:
        self.table = table
        self.ref, self.stored = self._image_columns(flags)
        self.text: str = self._column("--text-column", flags.text_column, TEXTS, "the words") or ""
        self.id = self._column("--id-column", flags.id_column, IDS, "")
        self.words = WordReader(str(table.path), self.text, self.texts(SAMPLE), flags.caption_key)

    def columns(self, rows: int, folder: Path) -> Columns:
        """Raises LlavaError if the table is damaged, or names only files and none is in `folder`."""
        values = self.texts(rows)
        words, outcomes = self.words.read(values)
        words = self._with_systems(words, rows)
        captions, conversations = self.words.texts_of(words)
        refs = [""] * len(values)
        if self.stored is None or self.ref is not None:
            for row, value in enumerate(self._image_values(rows)):
                refs[row], several = image_ref(value)
                if several:
                    outcomes[row] = Outcome(Status.SEVERAL_IMAGES)
                elif value in EMPTY and self._is_text_only(words[row], values[row]):
                    outcomes[row] = Outcome(Status.TEXT_ONLY)
        ids = self.table.values(self.id, rows) if self.id is not None else range(len(values))
        return Columns(
            image_refs=refs,
            captions=captions,
            ids=[_text(value) for value in ids],
            images=self._images(folder, refs),
            conversations=conversations,
            outcomes=outcomes,
        )

    def _images(self, folder: Path, refs: list[str]) -> Images | None:
        if self.stored is not None:
            return StoredImages(value_at(self.table, self.stored), LocalImages(folder, refs))
        # In a column of addresses, anything else is a broken address, not a path.
        if (self.ref or "").lower() == "url" and (any(map(is_address, refs)) or not any(refs)):
            return None
        return local_images(self.table.path, folder, refs)

    def _is_text_only(self, words: Words | None, value: Any) -> bool:
        """Whether a row without an image is a dialogue that speaks of none."""
        asked = isinstance(words, Dialogue) and any(question for question, _ in words.turns)
        return asked and not names_media(self.words.decoded(value))

    def _with_systems(self, words: list[Words | None], rows: int) -> list[Words | None]:
        name = next((name for name in self.table.names if name.lower() == "system"), None)
        systems = [None] * len(words) if name is None else self.table.values(name, rows)
        return [with_system(item, system) for item, system in zip(words, systems, strict=True)]

    def texts(self, rows: int) -> list[Any]:
        values = self._coalesced(self.text, TEXTS, rows)
        beside = {name.lower(): name for name in self.table.names}
        if self.text.lower() in ANSWERS and QUESTION in beside:
            return [turn_of(row) for row in question_rows(self.table, rows)]
        if self.text.lower() != "response" or "query" not in beside:
            return values
        queries = self.table.values(beside["query"], rows)
        history = self.table.values(beside["history"], rows) if "history" in beside else [None] * len(values)
        dialogues = zip(history, queries, values, strict=True)
        return [query_messages(earlier, query, answer) for earlier, query, answer in dialogues]

    def _image_values(self, rows: int) -> list[Any]:
        if self.ref is None:
            return [None] * rows
        return self._coalesced(self.ref, IMAGES, rows)

    def _coalesced(self, name: str, known: Sequence[str], rows: int) -> list[Any]:
        """A column; where rows of JSON lack it, the value of another one whose name is `known`."""
        values = self.table.values(name, rows)
        if self.table.kind(name) is None and name.lower() in known:
            for other in self._named(known):
                pairs = zip(values, self.table.values(other, rows), strict=True)
                values = [second if first in EMPTY else first for first, second in pairs]
        return values

    def _image_columns(self, flags: DataFlags) -> tuple[str | None, str | None]:
        """The column, or field of a struct, of addresses or paths, and the column of files themselves."""
        given = flags.image_column
        if given == NO_IMAGES and given not in self.table.names:
            return None, None
        if given is not None:
            name = self._column("--image-column", given, (), "")
            found = [name] if name else []
        else:
            found = self._named(IMAGES)
            if not found:
                flag = f"--image-column, {NO_IMAGES} for text without images"
                raise self._lacks("the images", flag, IMAGES[:3])
        kinds = [(name, *_kind_of_images(self.table, name)) for name in found]
        for name, ref, stored in kinds:
            if stored:
                return ref, name
        for _, ref, _ in kinds:
            if ref is not None:
                return ref, None
        raise LlavaError(
            f"{self.table.path}: column {found[0]!r} holds no images",
            expected="addresses, paths, image files, base64, or a struct of bytes and path",
            got=self._described(found[0]),
            do="name the column of the images by --image-column",
        )

    def _column(self, flag: str, given: str | None, known: Sequence[str], what: str) -> str | None:
        if given is not None:
            if given not in self.table.names:
                got = ", ".join(self.table.names)
                raise LlavaError(f"{self.table.path} has no column {given!r}", got=got, do=f"correct {flag}")
            self._require_once(given)
            return given
        found = self._named(known)
        if not found and what:
            raise self._lacks(what, flag, TEXTS[:5])
        return found[0] if found else None

    def _named(self, known: Sequence[str]) -> list[str]:
        """Columns with these names, the preferred first. Raises LlavaError if one is there twice."""
        order = {name: place for place, name in enumerate(known)}
        found = [name for name in self.table.names if name.lower() in order]
        for name in found:
            self._require_once(name)
        return sorted(found, key=lambda name: order[name.lower()])

    def _require_once(self, name: str) -> None:
        if self.table.names.count(name) > 1:
            raise LlavaError(f"{self.table.path} has more than one column {name!r}", do="drop all but one")

    def _lacks(self, what: str, flag: str, known: Sequence[str]) -> LlavaError:
        names = [name if len(name) <= 40 else f"{name[:40]}…" for name in self.table.names[:20]]
        more = ", …" * (len(self.table.names) > 20)
        return LlavaError(
            f"{self.table.path} lacks {what}",
            expected=f"a column {', '.join(known)}, …",
            got=", ".join(names) + more or "no column",
            do=f"name it by {flag}",
        )

    def _described(self, name: str) -> str:
        kind = self.table.kind(name)
        sample = next((value for value in self.table.values(name, SAMPLE) if value is not None), None)
        return f"{kind or type(sample).__name__}, such as {shown(sample)}"


def _kind_of_images(table: Table, name: str) -> tuple[str | None, bool]:
    """The column or field of addresses or paths, if there is one; whether the column holds files."""
    kind = table.kind(name)
    if kind is not None:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
            if pa.types.is_struct(kind) and "bytes" not in _fields(kind):
                return name, False
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if _is_binary(kind):
            return (name, False) if name.lower() in NAMES_ONLY else (None, True)
        if pa.types.is_struct(kind):
            fields = _fields(kind)
            ref = next((f"{name}.{field}" for field in ("path", "url") if field in fields), None)
            return ref, _is_binary(fields.get("bytes", pa.null()))
        if not (_is_text(kind) or pa.types.is_null(kind)):
            return None, False
    sample = [value for value in map(_only, table.values(name, SAMPLE)) if value not in (None, "")]
    if any(isinstance(value, str) and is_base64(value) for value in map(decoded, sample)):
        return (name if kind is None else None), True
    if any(isinstance(value, dict) and "bytes" in value for value in sample):
        return name, True
    fits = not sample or any(isinstance(decoded(value), str) or isinstance(value, dict) for value in sample)
    return (name, False) if fits else (None, False)


def _fields(kind: Any) -> dict[str, Any]:
    return {field.name: field.type for field in kind}


def _is_binary(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )  # fmt: skip


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _text(value: Any) -> str:
    return "" if value is None else str(decoded(value))
