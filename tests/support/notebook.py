"""Runs the lessons of docs/learn anew: python -m tests.support.notebook [LESSON ...].

Each English notebook runs in a kernel of its own; its code and what it shows are kept in both languages.
With --solved FILE all run in one kernel, in that file's folder, each exercise also with its answer, and what
the cells print is written there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.support.paths import ROOT

LEARN = ROOT / "docs/learn"
LESSONS = [path for path in sorted(LEARN.glob("0*.ipynb")) if not path.name.endswith(".zh-CN.ipynb")]
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def chinese(lesson: Path) -> Path:
    return lesson.with_suffix(".zh-CN.ipynb")


def execute(notebook: Any, folder: Path) -> None:
    """Run every cell in `folder`, in English. Raises CellExecutionError for the first that fails."""
    os.environ["LC_ALL"] = "C.UTF-8"
    NotebookClient(notebook, timeout=600, record_timing=False).execute(cwd=str(folder))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def solved(notebook: Any) -> dict[str, str]:
    """Code cells by their ids, and after each exercise the same with the code of its answer."""
    sources: dict[str, str] = {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}
    for cell in notebook.cells:
        if found := re.fullmatch(r"answer-(\d)", cell.id):
            (answer,) = re.findall(r"^```python\n(.*?)^```", cell.source, re.DOTALL | re.MULTILINE)
            sources[cell.id] = sources[f"exercise-{found[1]}"].replace("answer = None\n", answer)
    return sources


def run_solved(lessons: Sequence[Path], folder: Path) -> dict[str, dict[str, str]]:
    """What each cell of each lesson prints, by the names of both."""
    v4 = nbformat.v4
    whole, places = v4.new_notebook(), []  # type: ignore[no-untyped-call]
    for lesson in lessons:
        for name, source in {**solved(read(lesson)), "": "%reset -f"}.items():
            whole.cells.append(v4.new_code_cell(source))  # type: ignore[no-untyped-call]
            places.append((lesson.stem, name))
    execute(whole, folder)
    printed: dict[str, dict[str, str]] = {lesson.stem: {} for lesson in lessons}
    for (stem, name), cell in zip(places, whole.cells, strict=True):
        printed[stem][name] = "".join(output.get("text", "") for output in cell.outputs)
    return printed


def normal(notebook: Any, ran: Sequence[Any] = ()) -> str:
    """The text of the file, alike whatever Jupyter wrote it; with `ran`, this code and what it shows."""
    notebook.metadata = nbformat.from_dict(METADATA)  # type: ignore[no-untyped-call]
    for count, (cell, run) in enumerate(zip(code(notebook), ran or code(notebook), strict=True), 1):
        cell.source = run.source
        cell.outputs = _joined(copy.deepcopy(run.outputs))
        cell.execution_count = count
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    text: str = nbformat.writes(notebook)  # type: ignore[no-untyped-call]
    return text.rstrip("\n") + "\n"


def _joined(outputs: list[Any]) -> list[Any]:
    """What was printed between two pictures as one output, however it arrived."""
    joined: list[Any] = []
    for output in outputs:
        if (
            joined
            and output.output_type == "stream" == joined[-1].output_type
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":  # of a progress bar its last state
            output.text = re.sub(r"[^\n]*\r(?=[^\n])", "", output.text)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lesson", type=Path, nargs="*", default=LESSONS)
    parser.add_argument("--solved", type=Path)
    arguments = parser.parse_args()
    if arguments.solved:
        printed = run_solved(arguments.lesson, arguments.solved.parent)
        arguments.solved.write_text(json.dumps(printed), encoding="utf-8")
        return
    for lesson in arguments.lesson:
        notebook = read(lesson)
        execute(notebook, LEARN)
        for path in (lesson, chinese(lesson)):
            path.write_text(normal(read(path), code(notebook)), encoding="utf-8")


if __name__ == "__main__":
    main()
