"""What `extract run` opens and reads of large data: no more than it needs."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from extract.sources.find import find_sources
from llava_core.tables.words import SAMPLE
from tests.support.commands import call
from tests.support.local_data import extract, words, write_pictures
from tests.support.pictures import asked, good, write_parquet

_opened: list[list[str]] = []
"""Paths that Python opens, while one asks."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for paths in _opened:
            paths.append(str(arguments[0]))


sys.addaudithook(_note)


@contextlib.contextmanager
def opened() -> Iterator[list[str]]:
    """The paths opened in the `with` block."""
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


def as_lines(rows: list[dict[str, str]], path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, "{damaged", *lines]), encoding="utf-8")


def as_list(rows: list[dict[str, str]], path: Path) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1)[:-2] + ", {damaged", encoding="utf-8")


def as_csv(rows: list[dict[str, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["image", "caption"], *(list(row.values()) for row in rows), list("abc")])


@pytest.mark.parametrize(("name", "write"), [("x.jsonl", as_lines), ("x.json", as_list), ("x.csv", as_csv)])
def test_a_limit_ends_the_reading_of_a_table(name: str, write: Any, vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg", "b.jpg"])
    captions = ["一只猫，\n坐着", "a dog", *(f"caption {i}" for i in range(2 * SAMPLE))]
    images = ["a.jpg", "b.jpg"] * (SAMPLE + 1)
    rows = [{"image": image, "caption": text} for image, text in zip(images, captions, strict=True)]
    write(rows, tmp_path / name)
    extract(vision, tmp_path / name, "--limit", 3)
    assert words(tmp_path / name) == captions[:3]
    asked = extract(vision, tmp_path / name, "--limit", 3)  # the same rows are the same source
    assert "nothing to do" in asked.err
    assert name in extract(vision, tmp_path / name, code=1).one_line()


def test_a_limit_opens_no_later_file(base: str, vision: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"data/{name}.parquet", good(base, 3))
    (tmp_path / "data/c.parquet").write_bytes(b"PAR1 is damaged")
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--vision", vision, "--allow-private")
    call("extract", "run", *flags, "--limit", 5)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5")) == ["a.h5", "b.h5"]
    assert "c.parquet" in call("extract", "run", *flags, "--limit", 7, code=1).one_line()


def test_a_retry_reads_no_further_than_the_limit_did(vision: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_pictures(data, ["a.jpg", "b.jpg"])
    rows = [{"image": name, "caption": name} for name in ["a.jpg", "gone.jpg", *["b.jpg"] * SAMPLE]]
    as_lines(rows, data / "x.jsonl")  # damaged after these
    (data / "y.jsonl").write_text("{damaged")
    extract(vision, data, "--limit", 2, code=3)
    write_pictures(data, ["gone.jpg"])
    retry = ("extract", "retry-failed", "--out", data.parent / "features", "--vision", vision, "--json")
    assert call(*retry).summary["ok"] == 2


def test_columns_do_not_depend_on_a_small_limit(vision: Path, tmp_path: Path) -> None:
    """The first row has no words where the others have them."""
    write_pictures(tmp_path, ["a.jpg"])
    rows = [{"image": "a.jpg", "note": "1"}, *[{"image": "a.jpg", "note": "1", "caption": "a cat"}] * 9]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extract(vision, tmp_path / "x.jsonl", "--limit", 1, code=3)
    assert words(tmp_path / "x.jsonl") == ["bad caption"]


def test_names_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        write_parquet(tmp_path / f"{name}.parquet", good("http://127.0.0.1:9", 3))
    assert [source.stem for source in find_sources(str(tmp_path), limit=1)] == ["a-x"]
    assert [source.stem for source in find_sources(str(tmp_path))] == ["a-x", "b-x", "y"]


def test_finding_a_folder_of_images_reads_few_of_its_words(tmp_path: Path) -> None:
    for number in range(2 * SAMPLE):
        (tmp_path / f"{number:04d}.jpg").write_bytes(b"")
        (tmp_path / f"{number:04d}.txt").write_text("a cat")
    with opened() as paths:
        (source,) = find_sources(str(tmp_path))
    assert source.rows == 2 * SAMPLE
    assert sum(path.endswith(".txt") for path in paths) == SAMPLE


def test_resuming_opens_each_finished_shard_once(base: str, vision: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(12):
        write_parquet(data / f"{number:02d}.parquet", good(base, 1 + number % 3, start=10 * number))
    flags = ("--data", data, "--out", out, "--vision", vision, "--allow-private", "--json")
    call("extract", "run", *flags)
    with opened() as paths:
        assert "nothing to do" in call("extract", "run", *flags).err
    shards = [path for path in paths if path.startswith(str(out)) and path.endswith(".h5")]
    assert len(shards) == 2 * 12  # for its checksum and structures, and to read
    # Pictures of every finished shard, whichever were sorted together: none is downloaded again.
    before = asked.total()
    write_parquet(data / "last.parquet", [f"{base}/{10 * number}.jpg" for number in range(12)])
    assert call("extract", "run", *flags).summary["ok"] == 36
    assert asked.total() == before
