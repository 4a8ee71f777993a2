"""Files of ours, written and read."""

from __future__ import annotations

from pathlib import Path

from llava_core.filesystem import read_json_lines


def test_a_line_of_json_may_hold_what_looks_like_the_end_of_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"answer": "a\u2028b\x85c"}\n{"answer": ""}\n{"ans', encoding="utf-8")
    assert read_json_lines(path) == [{"answer": "a\u2028b\x85c"}, {"answer": ""}]
