"""Files written whole or not at all, and kept through a loss of power; and lines of JSON read."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_core.fingerprint import JsonDict


def read_json_lines(path: Path) -> list[JsonDict]:
    """The objects of a file of ours, without a last line that is still being written."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at U+2028, too
    return [json.loads(line) for line in lines]


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it, in one step: UTF-8, under a temporary name first."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
