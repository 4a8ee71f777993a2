"""Pictures and their words in every form of local data that `extract` takes, and what it makes of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from tests.support.commands import Ended, call
from tests.support.pictures import picture

NAMES = ["a.jpg", "b.jpg"]
CAPTIONS = ["一只猫", "a dog"]
DIALOGUE = [{"role": "user", "content": "<image>什么？"}, {"role": "assistant", "content": "猫"}]


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


def web_dataset(folder: Path) -> Path:
    """A tar archive of the pictures NAMES in a folder."""
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for name, text in zip(NAMES, CAPTIONS, strict=True):
            stem = name.removesuffix(".jpg")
            notes = json.dumps({"caption": "not this", "url": "http://127.0.0.1:9/x"}).encode()
            for suffix, content in (
                ("json", notes),
                ("jpg", (folder / name).read_bytes()),
                ("txt", text.encode()),
            ):
                member = tarfile.TarInfo(f"deep/{stem}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "00000.tar"


def extract(vision: Path, data: object, *flags: object, code: int = 0) -> Ended:
    """`extract run` of data into `features` beside it; asserts that it prints little, and no picture."""
    out = Path(str(data)).parent / "features"
    given = ("--data", data, "--vision", vision, "--out", out, "--device", "cpu", "--json", *flags)
    ended = call("extract", "run", *given, code=code)
    assert len(ended.err) < 5000
    assert "JFIF" not in ended.out + ended.err
    return ended


def words(data: object, name: str | None = None) -> list[Any]:
    """Words of the rows that are ok, and labels of the others, in the only shard or the one of this name."""
    folder = Path(str(data)).parent / "features"
    (path,) = folder.glob(f"{name or '*'}.h5")
    shard = Shard(path)
    return [
        shard.caption(row) if status == Status.OK else Status(status).label
        for row, status in enumerate(shard.status.tolist())
    ]


def turns(*answers: str) -> str:
    """Several captions of one image, as a shard keeps them."""
    return json.dumps([[None, answer] for answer in answers], ensure_ascii=False, separators=(",", ":"))
