"""Pictures and their words in every form of local data that `extract` takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.pictures import picture


def write_pictures(folder: Path, names: Sequence[str]) -> list[bytes]:
    """Picture i under the i-th name."""
    pictures = [picture(i) for i in range(len(names))]
    for name, content in zip(names, pictures, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return pictures


def write_parquet(path: Path, /, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def llava(image: str, *words: str) -> dict[str, Any]:
    """A row of LLaVA's format: question, answer, question, answer …"""
    said = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(words)]
    return {"id": f"id of {image}", "image": image, "conversations": said}
