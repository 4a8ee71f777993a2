"""LLaVA's own format: a JSON list, or JSON lines, of {id, image, conversations}."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from extract.sources.base import Columns, Source
from extract.sources.conversations import conversation_text
from extract.sources.local_images import local_images
from llava_core.errors import LlavaError, first_line

SUFFIXES = (".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class LlavaJson(Source):
    """Images are paths in the folder `images`, or addresses."""

    @classmethod
    def find(cls, path: Path, images: Path) -> LlavaJson:
        """Raises LlavaError unless the file is a list of rows that name images, with known roles."""
        entries = _entries(path)
        if entries and not any("image" in entry for entry in entries):
            got = ", ".join(entries[0]) or "nothing"
            raise LlavaError(f"{path} names no image", expected="{id, image, conversations}", got=got)
        _texts(path, entries)
        return cls(path, len(entries), images)

    def read(self) -> Columns:
        entries = _entries(self.path)[: self.rows]
        image_refs = [ref if isinstance(ref := entry.get("image"), str) else "" for entry in entries]
        return Columns(
            image_refs=image_refs,
            captions=_texts(self.path, entries),
            ids=[str(entry.get("id", row)) for row, entry in enumerate(entries)],
            images=local_images(self.path, self.images, image_refs),
            conversations=True,
        )


def _texts(path: Path, entries: list[dict[str, Any]]) -> list[str | None]:
    return [
        conversation_text(entry.get("conversations", entry.get("messages")), f"{path}, row {row}")
        for row, entry in enumerate(entries)
    ]


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: Any = []
    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        entries.append(_loaded(line, f"{path}, line {number}"))
        else:
            entries = _loaded(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise LlavaError(f"{path} is not UTF-8", got=error) from None
    if not isinstance(entries, list):
        raise LlavaError(f"{path} is not a JSON list", expected="[{id, image, conversations}, …]",
                         got=_kind(entries))  # fmt: skip
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise LlavaError(f"{path}, row {row}", expected="{id, image, conversations}",
                             got=_kind(entry))  # fmt: skip
    return entries


def _loaded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        do = "name a file of JSON lines *.jsonl" if lines else None
        raise LlavaError(f"{where} is not JSON", got=first_line(error), do=do) from None


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
