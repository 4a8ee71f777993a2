"""Words of rows in every form, through `extract run`; words that were mended."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from extract.config import RunConfig
from extract.extract_shards import open_shard
from extract.sources.base import Columns
from extract.sources.find import find_sources
from extract.sources.table import TableSource
from llava_core.shards.part_file import FinishedMeanwhile
from llava_core.shards.reader import Shard
from llava_core.vision.open import open_vision_tower
from tests.support.commands import call
from tests.support.local_data import (
    CAPTIONS,
    DIALOGUE,
    NAMES,
    extract,
    turns,
    words,
    write_json,
    write_parquet,
    write_pictures,
)

WORDS: dict[str, tuple[list[Any], list[str | None]]] = {
    "list": ([["一只猫", "a cat"], ["a dog"]], [turns("一只猫", "a cat"), turns("a dog")]),
    "struct": ([{"global_caption": text, "other": 1} for text in CAPTIONS], list(CAPTIONS)),
    "struct of another key": ([{"caption": text, "n": 1} for text in CAPTIONS], list(CAPTIONS)),
    "json text": ([json.dumps({"global_caption": text}) for text in CAPTIONS], list(CAPTIONS)),
    "json list": ([json.dumps([text]) for text in CAPTIONS], list(CAPTIONS)),
    "doubly encoded": (
        [json.dumps(json.dumps({"global_caption": text})) for text in CAPTIONS],
        list(CAPTIONS),
    ),
    "quoted": ([json.dumps(text) for text in CAPTIONS], list(CAPTIONS)),
    "python": ([str({"global_caption": text}) for text in CAPTIONS], list(CAPTIONS)),
    "parts": ([[{"type": "text", "text": text}] for text in CAPTIONS], list(CAPTIONS)),
    "bytes": ([text.encode() for text in CAPTIONS], list(CAPTIONS)),
    "dialogue": ([DIALOGUE, DIALOGUE], ['[["什么？","猫"]]'] * 2),
    "dialogue as text": ([json.dumps(DIALOGUE)] * 2, ['[["什么？","猫"]]'] * 2),
    "one is missing": ([None, "a dog"], [None, "a dog"]),
    "like json": (["[1] 猫", '{"a'], ["[1] 猫", '{"a']),
}


@pytest.mark.parametrize("kind", list(WORDS))
def test_words_of_every_kind_are_taken(
    vision: Path, tmp_path: Path, pictures: list[bytes], kind: str
) -> None:
    values, expected = WORDS[kind]
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=values)
    extract(vision, data, code=3 if None in expected else 0)
    assert words(data) == [text if text is not None else "bad caption" for text in expected]


def test_a_map_is_an_object(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    maps = pa.array([[("zh", "猫"), ("en", "cat")]] * 2, pa.map_(pa.string(), pa.string()))
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, text=maps)
    refused = extract(vision, data, code=1).one_line()
    assert "x.parquet: column 'text' has no readable text" in refused
    assert "give --caption-key one of zh, en" in refused
    assert not (tmp_path / "features").exists()
    extract(vision, data, "--caption-key", "zh")
    assert words(data) == ["猫", "猫"]


@pytest.mark.parametrize(
    ("values", "got"),
    [([1, 2], "got int 1"), ([{"zh": "猫"}] * 2, "got dict {zh: '猫'}"), ([[1.5], [2.5]], r"got list [1.5]"),
     (['{"zh": "猫"}'] * 2, "got dict {zh: '猫'}"), ([{"raw": b"\x89PNG" * 99}] * 2, "{raw: 396 bytes}")],
)  # fmt: skip
def test_words_that_are_none_are_refused_before_anything_is_written(
    vision: Path, tmp_path: Path, pictures: list[bytes], values: list[Any], got: str
) -> None:
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, cap_seg=values)
    line = extract(vision, data, code=1).one_line()
    assert "column 'cap_seg' has no readable text" in line
    assert got in line
    assert ("give --caption-key one of zh" in line) == ("zh" in got)
    assert not (tmp_path / "features").exists()


def test_mended_words_are_taken_without_encoding_again(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, [*NAMES, "c.jpg"])
    names = [*NAMES, "c.jpg"]
    data = write_parquet(tmp_path / "x.parquet", image=names, caption=["old", None, "kept"])
    ended = extract(vision, data, code=3)
    assert "1 row without text: correct them in --data, and run the same command again" in ended.err
    assert "retry-failed" not in ended.err
    before = Shard(tmp_path / "features/x.h5")
    write_parquet(data, image=names, caption=["new", "mended", "kept"])
    ended = extract(vision, data)
    assert "the texts of 2 rows changed; its images are not encoded again" in ended.err
    assert words(data) == ["new", "mended", "kept"]
    after = Shard(tmp_path / "features/x.h5")
    np.testing.assert_array_equal(after.read(0), before.read(0))
    assert ended.summary["stages"]["encode"]["busy"] >= 0
    assert not list(tmp_path.glob("features/*.part"))
    assert "nothing to do" in extract(vision, data).err


def test_mending_words_keeps_what_is_there(vision: Path, tmp_path: Path) -> None:
    """Features of an image that is gone since, thumbnails, and the number type."""
    write_pictures(tmp_path, NAMES)
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", "older"])
    extract(vision, data, "--thumbnails", "--dtype", "int8")
    before = Shard(tmp_path / "features/x.h5")
    kept = before.read(1), before.thumbnail(1), int(before.mtime[1])
    (tmp_path / "b.jpg").unlink()
    write_parquet(data, image=NAMES, caption=["new", "newer"])
    assert "holds features as int8; expected --dtype float16" in extract(vision, data, code=1).one_line()
    extract(vision, data, "--dtype", "int8")
    assert words(data) == ["new", "newer"]
    after = Shard(tmp_path / "features/x.h5")
    np.testing.assert_array_equal(after.read(1), kept[0])
    assert (after.thumbnail(1), int(after.mtime[1])) == kept[1:]
    picture = Image.new("RGB", (40, 40), (0, 200, 0))
    picture.save(tmp_path / "a.jpg")
    write_parquet(data, image=NAMES, caption=["newest", "newer"])
    extract(vision, data, "--dtype", "int8")
    assert not np.array_equal(Shard(tmp_path / "features/x.h5").read(0), after.read(0))


def test_a_mend_that_was_killed_is_finished_by_the_same_command(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", None])
    extract(vision, data, code=3)
    write_parquet(data, image=NAMES, caption=[None, "mended"])
    (source,) = find_sources(str(data))
    tower = open_vision_tower(vision)
    config = RunConfig(data=str(data), out=tmp_path / "features", vision=vision, device="cpu")
    open_shard(tmp_path / "features/x.h5", source, tower, config).close()  # as if killed here
    retry = ("extract", "retry-failed", "--out", tmp_path / "features", "--vision", vision, "--device", "cpu")
    line = call(*retry, code=1).one_line()
    assert "x.h5 is being made again, with other texts; let `extract run` finish that first" in line
    extract(vision, data, code=3)
    assert words(data) == ["bad caption", "mended"]


def test_retrying_knows_data_and_layer(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "b.jpg").unlink()
    write_parquet(tmp_path / "x.parquet", image=NAMES, words=CAPTIONS)
    extract(
        vision, tmp_path / "x.parquet", "--text-column", "words", "--layer", -2, "--decode", "exact", code=3
    )
    (tmp_path / "b.jpg").write_bytes(pictures[1])
    retry = ("extract", "retry-failed", "--out", tmp_path / "features", "--vision", vision, "--device", "cpu")
    call(*retry)
    assert words(tmp_path / "x.parquet") == CAPTIONS


def test_a_mend_encodes_damaged_rows_again(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", "kept"])
    extract(vision, data)
    before = Shard(tmp_path / "features/x.h5")
    features = before.read(1)
    with before.path.open("r+b") as file:
        file.seek(before.layout.offsets["features"] + features.nbytes)
        file.write(bytes(64))
    write_parquet(data, image=NAMES, caption=["new", "kept"])
    assert "the texts of 1 row changed" in extract(vision, data).err
    assert words(data) == ["new", "kept"]
    np.testing.assert_array_equal(Shard(before.path).read(1), features)


def test_a_mend_by_another_process_is_not_repeated(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", "kept"])
    extract(vision, data)
    write_parquet(data, image=NAMES, caption=["new", "kept"])

    class Slow(TableSource):
        def read(self) -> Columns:
            extract(vision, data)  # another process takes the words while this one reads them
            return super().read()

    config = RunConfig(data=str(data), out=tmp_path / "features", vision=vision, device="cpu")
    with pytest.raises(FinishedMeanwhile):
        open_shard(tmp_path / "features/x.h5", Slow(data, 2, tmp_path), open_vision_tower(vision), config)
    assert words(data) == ["new", "kept"]
    assert not list(tmp_path.glob("features/*.part"))


def test_a_caption_that_becomes_a_dialogue_is_one_changed_row(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    data = write_json(tmp_path / "x.json", [{"image": name, "caption": "a"} for name in NAMES])
    extract(vision, data)
    write_json(data, [{"image": "a.jpg", "caption": "a"}, {"image": "b.jpg", "caption": ["b", "c"]}])
    assert "the texts of 1 row changed" in extract(vision, data).err
    assert words(data) == [turns("a"), turns("b", "c")]


@pytest.mark.parametrize("kind", ["text", "bytes"])
def test_a_dialogue_about_an_image_that_is_not_there_is_a_failure(
    vision: Path, tmp_path: Path, pictures: list[bytes], kind: str
) -> None:
    talk = json.dumps([{"role": "user", "content": "q"}, DIALOGUE[1]])
    said = [json.dumps(DIALOGUE), json.dumps(DIALOGUE), talk]
    given = [text.encode() for text in said] if kind == "bytes" else said
    data = write_parquet(tmp_path / "x.parquet", image=["a.jpg", None, None], messages=given)
    extract(vision, data, code=3)
    assert words(data) == ['[["什么？","猫"]]', "no file", "text only"]


def test_an_unknown_role_is_a_failed_row(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    """In a table, in an archive and beside an image alike; a file of nothing else is refused."""
    strange = [{"role": "tool", "content": "x"}, DIALOGUE[1]]
    tables = tmp_path / "tables"
    write_pictures(tables, NAMES)
    write_json(
        tables / "x.json",
        [{"image": n, "messages": m} for n, m in zip(NAMES, (strange, DIALOGUE), strict=True)],
    )
    beside = tmp_path / "beside"
    write_pictures(beside, NAMES)
    with tarfile.open(tmp_path / "tar.tar", "w") as archive:
        for name, messages in zip(NAMES, (strange, DIALOGUE), strict=True):
            write_json((beside / name).with_suffix(".json"), messages)
            archive.add(beside / name, name)
            archive.add((beside / name).with_suffix(".json"), f"{name[0]}.json")
    for data, name in ((tables / "x.json", "x"), (beside, "beside"), (tmp_path / "tar.tar", "tar")):
        ended = extract(vision, data, code=3)
        assert words(data, name) == ["bad caption", '[["什么？","猫"]]']
        assert ended.summary["by_reason"] == {"bad caption": {"unknown role 'tool'": 1}}
    write_json(tables / "y.json", [{"image": name, "messages": strange} for name in NAMES])
    line = extract(vision, tables / "y.json", code=1).one_line()
    assert "y.json, row 0: unknown role 'tool'; expected one of human, user, gpt, assistant, system" in line


def test_text_that_is_no_utf8_is_kept_and_said_once(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    broken = b"caf\xe9"
    column = pa.array([broken, b"a dog"], pa.binary()).view(pa.string())
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=column)
    with tarfile.open(tmp_path / "y.tar", "w") as archive:
        for name, text in zip(NAMES, (broken, b"a dog"), strict=True):
            archive.add(tmp_path / name, name)
            member = tarfile.TarInfo(f"{name[0]}.txt")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    for path in (data, tmp_path / "y.tar"):
        said = extract(vision, path).err
        assert said.count(f"{path}: 1 row with text that is not UTF-8, kept as \ufffd") == 1
        assert words(path, path.stem) == ["caf\ufffd", "a dog"]
