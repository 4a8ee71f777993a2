"""llava_align.demo.lessons beside what the lessons themselves test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_align.demo import lessons


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "not answered yet: write your answer in place of None"),
        (29.0, "29 is too low"),
        (31, "31 is too high"),
        (30.25, "right: 30.25"),
        ("30.26", "right: 30.26"),
        ("30 GB", "an answer is a number; got '30 GB'"),
        ([30.26], "an answer is a number; got [30.26]"),
    ],
)
@pytest.mark.parametrize("right", [30.26, "features-1"])
def test_an_answer_is_checked(
    answer: Any, said: str, right: float | str, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons.check(answer, right)
    assert capsys.readouterr().out == f"{said}\n"


def test_an_answer_with_a_name_has_its_own_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    for answer in (1_837_056, 1_837_055):
        lessons.check(answer, "projector-1")
    assert capsys.readouterr().out == "right: 1,837,056\n1,837,055 is too low\n"


def test_a_split_is_drawn_once_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lessons.ROWS, "held-out", 3)
    split = lessons._split(tmp_path, "held-out")
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in split.pictures]
    assert len(texts) == len(split.scenes) == 3
    assert all(scene.background in text for scene, text in zip(split.scenes, texts, strict=True))
    images = [path.read_bytes() for path in split.pictures]
    written = split.pictures[0].stat().st_mtime_ns
    assert lessons._split(tmp_path, "held-out") == split
    assert split.pictures[0].stat().st_mtime_ns == written
    split.pictures[2].with_suffix(".txt").unlink()  # as if it had been interrupted
    assert lessons._split(tmp_path, "held-out") == split
    assert [path.read_bytes() for path in split.pictures] == images
    assert split.pictures[2].with_suffix(".txt").read_text(encoding="utf-8") == texts[2]
