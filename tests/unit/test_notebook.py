"""The lessons of docs/learn in the repository: alike in both languages, run once, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebook import LEARN, LESSONS, chinese, code, normal, read

NOTEBOOKS = [path for lesson in LESSONS for path in (lesson, chinese(lesson))]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_lesson = pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)


def text(notebook: Any) -> dict[str, str]:
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "markdown"}


def test_there_are_eight() -> None:
    assert [path.name[:2] for path in LESSONS] == [f"{k:02d}" for k in range(1, 9)]
    assert {*LEARN.glob("*.ipynb")} == {*NOTEBOOKS}


@each_notebook
def test_the_file_is_in_its_normal_form(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == normal(read(path)), "run python -m tests.support.notebook"
    assert path.stat().st_size < 150_000
    for cell in code(read(path)):
        for output in cell.outputs:
            assert len(output.get("data", {}).get("image/png", "")) < 80_000, cell.id  # 60 KB as base64


@each_lesson
def test_both_languages_run_the_same_code_and_show_the_same(lesson: Path) -> None:
    english, translated = read(lesson), read(chinese(lesson))
    assert [cell.id for cell in english.cells] == [cell.id for cell in translated.cells]
    assert code(english) == code(translated)
    for name, source in text(english).items():
        other = text(translated)[name]
        assert not re.search("[一-鿿]", re.sub(r"大|小|有|画着", "", source)), name
        assert re.search("[一-鿿]", other), name
        assert re.findall(r"^```.*?^```", source, re.DOTALL | re.MULTILINE) == re.findall(
            r"^```.*?^```", other, re.DOTALL | re.MULTILINE
        )
        assert len(re.findall("^#+ ", source, re.MULTILINE)) == len(re.findall("^#+ ", other, re.MULTILINE))


@each_lesson
def test_every_exercise_has_an_answer(lesson: Path) -> None:
    ids = [cell.id for cell in read(lesson).cells]
    exercises = [name for name in ids if re.fullmatch(r"exercise-\d", name)]
    assert len(exercises) >= 2
    assert [name for name in ids if name.startswith("answer-")] == [
        name.replace("exercise", "answer") for name in exercises
    ]


@each_notebook
def test_numbers_in_the_text_are_those_that_cells_show(path: Path) -> None:
    notebook = read(path)
    shown = " ".join(cell.source for cell in code(notebook))
    for cell in code(notebook):
        shown += " ".join(output.get("text", "") for output in cell.outputs)
    for name, source in text(notebook).items():
        if name.endswith("-question"):
            continue
        prose = re.sub(r"<details>.*</details>|\]\([^)]*\)|`[^`]*`", "", source, flags=re.DOTALL)
        for number in re.findall(r"(?<![-\w.])\d+\.\d+(?!\w)", prose):
            assert number in shown, f"{name}: {number}"


@each_lesson
def test_it_ran_from_top_to_bottom(lesson: Path) -> None:
    cells = code(read(lesson))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data"), cell.id
            if output.get("name") == "stderr":  # where the API logs, as the commands do
                assert not re.search("Warning|Traceback|error:", output.text), cell.id
            shown = output.text if "text" in output else output.data.get("text/plain", "")
            assert not re.search(r"(?:^|[\s'\"=])/\w+|[A-Z]:\\|\r|\x1b|site-packages", shown), cell.id


@each_notebook
def test_links_lead_somewhere(path: Path) -> None:
    for source in text(read(path)).values():
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", source):
            file = path.parent / target
            assert file.exists(), target
            if ".zh-CN" in path.name:
                assert not file.with_suffix(f".zh-CN{file.suffix}").exists(), target
