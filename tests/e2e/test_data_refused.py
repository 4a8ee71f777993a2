"""What `extract run` leaves out of a folder, and files that are no data, or damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from PIL import Image

from tests.support.local_data import (
    CAPTIONS,
    NAMES,
    extract,
    web_dataset,
    words,
    write_json,
    write_parquet,
    write_pictures,
)


def test_what_is_left_out_of_a_folder_is_said(vision: Path, tmp_path: Path) -> None:
    names = ["a.jfif", "b.jpe", "c", "d.heic", "e.heic", "f.mp4"]
    for name, content in zip(names, write_pictures(tmp_path / "set", names), strict=True):
        if name in ("d.heic", "e.heic"):
            (tmp_path / "set" / name).write_bytes(b"\0\0\0\x18ftypheic" + content)
    for name, kind in (("g.tif", "TIFF"), ("h.avif", "AVIF")):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "set" / name, kind)
    for stem in "abcdefgh":
        (tmp_path / f"set/{stem}.txt").write_text(stem)
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == ["a", "b", "c", "g", "h"]
    (line,) = [line for line in ended.err.splitlines() if "left out" in line]
    assert "2 .heic, 3 .txt, 1 .mp4 left out" in line or "3 .txt, 2 .heic, 1 .mp4 left out" in line


def test_tables_that_are_left_out_are_said(vision: Path, tmp_path: Path) -> None:
    """Beside images with their words, notes that are no tables; beside parquet files, other tables."""
    write_pictures(tmp_path / "set", NAMES)
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (tmp_path / "set" / name).with_suffix(".txt").write_text(text)
    write_json(tmp_path / "set/info.json", {"classes": ["cat", "dog"]})
    (tmp_path / "set/log.csv").write_text("step,loss\n1,2\n")
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == CAPTIONS
    assert "2 files of data left out, such as info.json; give --data the name of one" in ended.err
    write_parquet(tmp_path / "set/x.parquet", image=NAMES, caption=["x", "y"])
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set", "x") == ["x", "y"]
    assert "2 files of data left out" in ended.err


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a pointer of Git LFS, not the file itself",
        ),
        (b"PARE" + bytes(99), "an encrypted parquet file"),
        (b"Rar!\x1a\x07\x00" + bytes(99), "a RAR archive"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (gzip.compress(bytes(257) + b"ustar" + bytes(999)), "a compressed tar archive"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page, as failed downloads leave"),
        (b"PAR1" + bytes(99), "is not a readable parquet file"),
        (b"ARROW1" + bytes(99), "is not a readable Arrow file"),
        (bytes(257) + b"ustar" + bytes(999), "is a damaged tar archive"),
        (b"\x00\x01" * 50, "is no table"),
    ],
    ids=["lfs", "encrypted", "rar", "zip", "tar.gz", "html", "parquet", "arrow", "tar", "bytes"],
)
def test_files_that_are_something_else_are_named(
    vision: Path, tmp_path: Path, head: bytes, line: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(head)
    assert line in extract(vision, tmp_path / "x.parquet", code=1).one_line()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.csv", b'image,caption\na.jpg,"unclosed\nb.jpg,x\n', "is no CSV; got unexpected end of data"),
        ("x.csv", b"image,caption\na.jpg,\xff\xff\n", "x.csv is neither UTF-8 nor GB 18030"),
        ("x.csv", b"image,caption,caption\na.jpg,x,y\n", "more than one column 'caption'"),
        ("x.csv", b"image,caption\na.jpg,x,y\n", "line 2; expected 2 fields; got 3"),
        (
            "x.JSONL",
            b'{"image": "a.jpg", "caption": ' + b"[" * 700 + b"]" * 700 + b"}",
            "has no readable text",
        ),
        (
            "x.json",
            b'[{"image": "a.jpg", "conversations": [{"from": "' + b"r" * 5000 + b'"}]}]',
            "unknown role",
        ),
        ("x.csv", b"image,caption\n\"b'/9j/" + b"A" * 3000 + b"'\",x\n", "none of the images that"),
    ],
    ids=["quotes", "encoding", "twice", "fields", "deep", "role", "bytes as text"],
)
def test_damaged_tables_are_one_short_line(
    vision: Path, tmp_path: Path, pictures: list[bytes], name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused = extract(vision, tmp_path / name, code=1).one_line()
    assert line in refused
    assert len(refused) < 700


def test_archives_that_are_not_whole(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", NAMES)
    archive = web_dataset(tmp_path / "set")
    whole = archive.read_bytes()
    archive.write_bytes(whole + whole)
    assert "damaged, or two in one file" in extract(vision, archive, code=1).one_line()
    archive.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    assert "has no end mark: samples may be missing from its end" in extract(vision, archive).err
