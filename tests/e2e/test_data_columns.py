"""Columns of images in every form, through `extract run`; which columns are taken."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_core.shards.reader import Shard
from tests.support.local_data import (
    CAPTIONS,
    DIALOGUE,
    NAMES,
    extract,
    turns,
    words,
    write_json,
    write_parquet,
)


def image_values(kind: str, pictures: list[bytes]) -> Any:
    coded = [base64.b64encode(content).decode() for content in pictures]
    kinds: dict[str, Callable[[], Any]] = {
        "large": lambda: pa.array(pictures, pa.large_binary()),
        "dictionary": lambda: pa.array(pictures, pa.dictionary(pa.int32(), pa.binary())),
        "list of one": lambda: [[content] for content in pictures],
        "structs in lists": lambda: [[{"bytes": content, "path": "x"}] for content in pictures],
        "base64": lambda: coded,
        "wrapped": lambda: ["\n".join(text[i : i + 76] for i in range(0, len(text), 76)) for text in coded],
        "base64 bytes": lambda: [text.encode() for text in coded],
        "data url": lambda: [f"data:image/jpeg;base64,{text}" for text in coded],
        "paths in lists": lambda: [[name] for name in NAMES],
        "openai": lambda: [{"url": name} for name in NAMES],
    }
    return kinds[kind]()


IMAGE_KINDS = ("large", "dictionary", "list of one", "structs in lists", "base64", "wrapped", "base64 bytes",
               "data url", "paths in lists", "openai")  # fmt: skip


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_images_of_every_kind_are_taken(
    vision: Path, tmp_path: Path, pictures: list[bytes], kind: str, form: str
) -> None:
    values = image_values(kind, pictures)
    data = tmp_path / f"x.{form}"
    table = pa.table({"pic": values, "TEXT": CAPTIONS, "KEY": ["k", "l"]})
    if form == "parquet":
        pq.write_table(table, data)
    elif form == "arrow":
        with pa.OSFile(str(data), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif isinstance(table.to_pylist()[0]["pic"], bytes) or "bytes" in str(table.schema.field("pic").type):
        pytest.skip("JSON has no bytes")
    elif kind in ("list of one", "base64 bytes"):
        pytest.skip("JSON has no bytes")
    else:
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    extract(vision, data, "--image-column", "pic")
    assert words(data) == CAPTIONS
    shard = Shard(tmp_path / "features/x.h5")
    assert [shard.id(row) for row in range(2)] == ["k", "l"]
    assert not any("base64" in url or len(url) > 40 for url in shard.urls())


def test_arrow_types_without_a_place_in_parquet(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    size = max(map(len, pictures))
    fixed = pa.array([content.ljust(size, b"\0") for content in pictures], pa.binary(size))
    for name, column in {"fixed": fixed, "view": pa.array(pictures, pa.binary_view())}.items():
        data = tmp_path / name / "data-00000-of-00001.arrow"
        data.parent.mkdir()
        table = pa.table({"image": column, "text": CAPTIONS})
        with pa.OSFile(str(data), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_json(data.parent / "dataset_info.json", {"features": {}})
        write_json(data.parent / "state.json", {"_data_files": []})
        extract(vision, data.parent, "--out", tmp_path / name / "features")
        assert words(data) == CAPTIONS


def test_several_images_in_one_row_are_a_failure_with_a_name(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    data = tmp_path / "x.jsonl"
    rows = [{"images": NAMES, "messages": DIALOGUE}, {"images": ["a.jpg"], "messages": DIALOGUE},
            {"images": [], "messages": [{"role": "user", "content": "q"}, DIALOGUE[1]]},
            {"images": [], "messages": DIALOGUE},
            {"images": [], "messages": [{"role": "user", "content": "<video>q"}, DIALOGUE[1]]}]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, rows)))
    ended = extract(vision, data, code=3)
    assert words(data) == ["several images", '[["什么？","猫"]]', "text only", "no file", "no file"]
    assert ended.summary["failed"] == 3
    assert "1 row about several images: a row may have one" in ended.err


def test_rows_of_one_file_may_name_their_image_and_words_differently(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"image": "a.jpg", "conversations": talk}, {"images": ["b.jpg"], "messages": talk},
            {"image_path": "a.jpg", "caption": "c"}, {"image": {"file": "b.jpg"}, "conversations": talk},
            {"conversations": talk}, {"image": "a.jpg", "captions": ["x", "", "y"]}]  # fmt: skip
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    extract(vision, data, code=3)
    dialogue = '[["q","a"]]'
    assert words(data) == [dialogue, dialogue, turns("c"), "no file", "text only", turns("x", "y")]


def test_columns_that_are_not_there(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    data = write_parquet(tmp_path / "x.parquet", pic=NAMES, words=CAPTIONS)
    lines = [
        extract(vision, data, code=1).one_line(),
        extract(vision, data, "--image-column", "pic", code=1).one_line(),
        extract(vision, data, "--image-column", "picture", code=1).one_line(),
    ]
    assert (
        "lacks the images; expected a column url, image, path, …; got pic, words; name it by --image-column"
        in lines[0]
    )
    assert "lacks the words" in lines[1]
    assert "name it by --text-column" in lines[1]
    assert "has no column 'picture'; got pic, words; correct --image-column" in lines[2]
    extract(vision, data, "--image-column", "pic", "--text-column", "words", "--id-column", "words")
    assert words(data) == CAPTIONS


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_a_list_whose_bytes_are_null_names_a_file(
    vision: Path, tmp_path: Path, pictures: list[bytes], form: str
) -> None:
    coded = base64.b64encode(pictures[0]).decode() if form == "jsonl" else pictures[0]
    talk = [{"role": "user", "content": "q"}, DIALOGUE[1]]
    images = [[{"bytes": coded, "path": "gone.jpg"}], [{"bytes": None, "path": "b.jpg"}], []]
    table = pa.table({"images": images, "messages": [DIALOGUE, DIALOGUE, talk]})
    data = tmp_path / f"x.{form}"
    if form == "parquet":
        pq.write_table(table, data)
    elif form == "arrow":
        with pa.OSFile(str(data), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        data.write_text("\n".join(map(json.dumps, table.to_pylist())))
    extract(vision, data)
    assert words(data) == ['[["什么？","猫"]]'] * 2 + ["text only"]
    assert Shard(tmp_path / "features/x.h5").urls() == ["gone.jpg", "b.jpg", ""]
