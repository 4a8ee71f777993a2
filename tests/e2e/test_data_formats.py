"""Data as other tools write it, through `extract run`."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_core.shards.reader import Shard
from tests.support.local_data import (
    CAPTIONS,
    DIALOGUE,
    NAMES,
    extract,
    llava,
    web_dataset,
    words,
    write_json,
    write_parquet,
    write_pictures,
)


def ms_swift(folder: Path) -> Path:
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"query": "什么？", "response": "猫", "history": [["q", "a"]], "images": ["a.jpg"]},
            {"query": "<image>什么", "response": "狗", "images": ["b.jpg"], "history": history}]  # fmt: skip
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "x.jsonl"


def sharegpt(folder: Path) -> Path:
    return write_json(
        folder / "x.json", [llava(name, "q", text) for name, text in zip(NAMES, CAPTIONS, strict=True)]
    )


def comma_separated(folder: Path) -> Path:
    with (folder / "x.csv").open("w", newline="", encoding="gb18030") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "caption"), ("a.jpg", "一只猫，\n坐着"), ("b.jpg", 'a "dog"')])
    return folder / "x.csv"


def tab_separated(folder: Path) -> Path:
    (folder / "x.tsv").write_text("URL\tTEXT\na.jpg\t一只猫\nb.jpg\ta dog\n", encoding="utf-8-sig")
    return folder / "x.tsv"


def compressed(folder: Path) -> Path:
    rows = [{"image": name, "caption": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return folder / "x.jsonl.gz"


def json_lines_named_json(folder: Path) -> Path:
    rows = [{"image": name, "caption": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "x.json").write_text("\n".join(map(json.dumps, rows)))
    return folder / "x.json"


def image_folder(folder: Path) -> Path:
    rows = [{"file_name": name, "text": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def beside(folder: Path) -> Path:
    (folder / "a.caption").write_text("一只猫")
    (folder / "b.jpg.txt").write_text("a dog")
    return folder


def course(folder: Path) -> Path:
    (folder / "set/images").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).rename(folder / f"set/images/{number}.jpg")
        write_json(folder / f"set/labels_zh/{number}.json", DIALOGUE)
    return folder / "set"


def img2dataset_tars(folder: Path) -> Path:
    web_dataset(folder)
    write_parquet(folder / "00000.parquet", url=["http://127.0.0.1:9/x"] * 2, caption=["no"] * 2)
    write_json(folder / "00000_stats.json", {"count": 2})
    return folder


def img2dataset_files(folder: Path) -> Path:
    (folder / "00000").mkdir()
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).rename(folder / "00000" / name)
        (folder / "00000" / name).with_suffix(".txt").write_text(text)
        write_json(
            (folder / "00000" / name).with_suffix(".json"), {"caption": text, "url": "http://127.0.0.1:9/x"}
        )
    write_parquet(folder / "00000.parquet", url=["http://127.0.0.1:9/x"] * 2, caption=["no"] * 2)
    return folder


FORMS: list[tuple[Callable[[Path], Path], list[str]]] = [
    (ms_swift, ['[["q","a"],["什么？","猫"]]', '[["q","a"],["什么","狗"]]']),
    (sharegpt, ['[["q","一只猫"]]', '[["q","a dog"]]']),
    (comma_separated, ["一只猫，\n坐着", 'a "dog"']),
    (tab_separated, CAPTIONS),
    (compressed, CAPTIONS),
    (json_lines_named_json, CAPTIONS),
    (image_folder, CAPTIONS),
    (beside, CAPTIONS),
    (course, ['[["什么？","猫"]]'] * 2),
    (web_dataset, CAPTIONS),
    (img2dataset_tars, CAPTIONS),
    (img2dataset_files, CAPTIONS),
]


@pytest.mark.parametrize(("write", "expected"), FORMS, ids=[write.__name__ for write, _ in FORMS])
def test_formats_of_other_tools(
    vision: Path, tmp_path: Path, write: Callable[[Path], Path], expected: list[str]
) -> None:
    folder = tmp_path / "data"
    write_pictures(folder, NAMES)
    data = write(folder)
    ended = extract(vision, data, "--out", tmp_path / "features")
    (path,) = (tmp_path / "features").glob("*.h5")
    assert [Shard(path).caption(row) for row in range(2)] == expected
    assert ended.summary["ok"] == 2
    if "img2dataset" in write.__name__:
        assert "the images of 1 table are on this disk; they are not downloaded" in ended.err
    elif write is comma_separated:
        assert "is not UTF-8; it is read as GB 18030" in ended.err
    else:
        assert "left out" not in ended.err


@pytest.mark.parametrize(
    ("files", "expected", "left_out"),
    [
        (["v1.0/22.05.jpg", "v1.0/22.05.txt", "v1.0/22.06.jpg", "v1.0/22.06.txt"], ["05", "06"], ""),
        (["7.input.jpg", "8.input.jpg", "7.output.txt", "8.output.txt"], ["output", "output"], ""),
        (["7.jpg", "7.seg.png", "7.txt", "7.cls"], ["7"], "1 seg.png"),
        (["7.jpg", "7.txt", "8.jpg"], ["7", "bad caption"], ""),
    ],
)
def test_names_in_tar_archives(
    vision: Path, tmp_path: Path, files: list[str], expected: list[str], left_out: str
) -> None:
    (content,) = write_pictures(tmp_path, ["a.jpg"])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in files:
            text = name.rpartition("/")[2].removesuffix(".txt").rpartition(".")[2].encode()
            data = content if name.endswith(("jpg", "png")) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    ended = extract(vision, tmp_path / "x.tar", code=3 if "bad caption" in expected else 0)
    assert words(tmp_path / "x.tar") == expected
    assert left_out in ended.err


def test_equal_names_in_two_folders_do_not_collide(vision: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_pictures(tmp_path / "set" / split, NAMES)
        write_parquet(
            tmp_path / "set" / split / "data.parquet", image=NAMES, caption=[f"{split} {n}" for n in NAMES]
        )
    extract(vision, tmp_path / "set")
    assert words(tmp_path / "set", "train-data") == ["train a.jpg", "train b.jpg"]
    assert words(tmp_path / "set", "test-data") == ["test a.jpg", "test b.jpg"]
    shard = tmp_path / "features/train-data.h5"
    shard.rename(shard.with_name("data.h5"))
    line = extract(vision, tmp_path / "set", code=1).one_line()
    assert "data.h5 was made when only one file was called data.parquet; rename it" in line


def test_a_table_named_as_an_image_is_a_table(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", [*NAMES, "train.png"])
    write_parquet(tmp_path / "set/train.parquet", image=NAMES, caption=CAPTIONS)
    extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == CAPTIONS


def test_a_folder_that_spark_writes_is_entered(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", NAMES)
    write_parquet(tmp_path / "set/x.parquet/part-0.snappy.parquet", image=NAMES, caption=CAPTIONS)
    (tmp_path / "set/x.parquet/_SUCCESS").touch()
    extract(vision, tmp_path / "set", "--images", tmp_path / "set")
    assert words(tmp_path / "set") == CAPTIONS
    extract(vision, tmp_path / "set/x.parquet", "--images", tmp_path / "set", "--out", tmp_path / "features")


def test_a_column_may_have_the_name_of_a_kind(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "x.csv").write_text("PARENT_ID,image,caption\n1,a.jpg,一只猫\n2,b.jpg,a dog\n")
    extract(vision, tmp_path / "x.csv")
    assert words(tmp_path / "x.csv") == CAPTIONS


def test_the_words_that_are_not_empty_are_taken(vision: Path, tmp_path: Path) -> None:
    """`0.txt` beside `0.json`, as img2dataset leaves it where there was no caption; in an archive, too."""
    folder = tmp_path / "set"
    write_pictures(folder, NAMES)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, text in zip(NAMES, CAPTIONS, strict=True):
            stem = folder / name[0]
            stem.with_suffix(".txt").touch()
            write_json(stem.with_suffix(".json"), {"caption": text})
            for path in (folder / name, stem.with_suffix(".txt"), stem.with_suffix(".json")):
                archive.add(path, path.name)
    for data in (folder, tmp_path / "x.tar"):
        extract(vision, data)
        assert words(data, data.stem) == CAPTIONS


def test_label_folders_of_deeper_images_and_tables_in_them(vision: Path, tmp_path: Path) -> None:
    """`labels/a/0.json` is for `images/a/0.jpg`; without its image, it is left out; a table is a table."""
    write_pictures(tmp_path / "set/images", ["a/0.jpg", "b/0.jpg"])
    for name, text in (("a/0", "一只猫"), ("b/0", "a dog"), ("b/gone", "no image")):
        write_json(tmp_path / f"set/labels/{name}.json", {"caption": text})
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == CAPTIONS
    assert "1 file of data left out, such as gone.json" in ended.err
    write_pictures(tmp_path / "table/images", NAMES)
    rows = [{"image": name, "caption": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    write_json(tmp_path / "table/labels/train.json", rows)
    extract(vision, tmp_path / "table", "--images", tmp_path / "table/images")
    assert words(tmp_path / "table", "train") == CAPTIONS
