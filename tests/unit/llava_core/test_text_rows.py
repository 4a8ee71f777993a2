"""The first rows of tables as text are those that the whole table has."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_core.errors import LlavaError
from llava_core.tables import text_rows
from llava_core.tables.row_batches import row_batches
from llava_core.tables.table_files import RowTable, open_table

ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), st.text() | st.integers(), min_size=1), max_size=6)


def entries(path: Path, rows: int | None = None) -> list[dict[str, object]]:
    table = open_table(path, rows)
    assert isinstance(table, RowTable)
    return table.entries


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(rows=ROWS, taken=st.integers(1, 7), block=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_a_json_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[object], taken: int, block: int, indent: int
) -> None:
    monkeypatch.setattr(text_rows, "BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text(" \n" + json.dumps(rows, ensure_ascii=False, indent=indent), "utf-8", "surrogatepass")
    assert entries(path, taken)[:taken] == rows[:taken]


@pytest.mark.parametrize(
    "content", ["[{}, 1, {}]", "[{},, {}]", "[{} {}]", "[[{}], {}]", "[{}, {}", '[{"a": }']
)
def test_what_is_wrong_before_the_last_of_them_is_refused_as_in_the_whole(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(Exception, match=r"x\.json") as whole:
        open_table(path)
    with pytest.raises(type(whole.value)) as first:
        open_table(path, 2 if content != "[{}, {}" else 3)
    assert str(first.value) == str(whole.value)


@pytest.mark.parametrize("block", range(1, 30))
def test_a_list_is_left_where_the_rows_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(text_rows, "BLOCK", block)
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1} ,\n  {"a": 2} ,\n  {"a": 3}, {damaged')
    assert entries(path, 2) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.json", b'{"a": 1}'), ("x.csv", b"a,b\n1,\0\n2,3\n"), ("x.csv", b"a,b\n1,2\n\xff,3\n")],
)
def test_what_the_whole_is_refused_for_is_refused_at_its_beginning(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LlavaError) as whole:
        open_table(path)
    with pytest.raises(LlavaError) as first:
        open_table(path, 2 if name == "x.json" else 1)
    assert str(first.value) == str(whole.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("packed", [False, True])
def test_csv(tmp_path: Path, encoding: str, packed: bool) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(
        [["image", "caption"], *([f"{i}.jpg", f'图片里的猫,\n"{i}"'] for i in range(5))]
    )
    path = tmp_path / ("x.csv.gz" if packed else "x.csv")
    data = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert entries(path, 3)[:3] == entries(path)[:3] == [
        {"image": f"{i}.jpg", "caption": f'图片里的猫,\n"{i}"'} for i in range(3)
    ]  # fmt: skip


def test_a_bar_counts_the_rows_of_a_large_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Joining millions of words takes a minute, of which a terminal shows how far it is."""
    path = tmp_path / "words.jsonl"
    path.write_text('{"id": 1}\n' * 3)
    assert list(row_batches(path)) == [[{"id": 1}] * 3]
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert len(list(row_batches(path))) == 1
    assert "words.jsonl: 0 rows" in capsys.readouterr().err
