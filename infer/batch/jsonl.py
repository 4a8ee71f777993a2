"""JSON lines: one object a line, in UTF-8."""

from __future__ import annotations

import json
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.types import JsonDict


def read_lines(path: Path) -> list[JsonDict]:
    """The objects of a file. Raises LlavaError naming the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        raise LlavaError(f"{path} is no text file", expected="JSON lines in UTF-8") from None
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            to_line(content)
        except (ValueError, RecursionError):  # UnicodeEncodeError, for half a character, among them
            content = None
        if not isinstance(content, dict):
            raise LlavaError(f"line {number} of {path} is no JSON object", got=line[:80])
        objects.append(content)
    return objects


def to_line(content: JsonDict) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
