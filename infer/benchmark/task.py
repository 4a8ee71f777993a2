"""A task: questions about images with right answers, from VLMEvalKit's TSV or lmms-eval's parquet files."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from infer.benchmark.answer_text import yes_or_no
from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.filesystem import matching
from llava_core.tables.column_names import IMAGES
from llava_core.tables.conversations import IMAGE_MARK
from llava_core.tables.image_values import image_bytes, image_ref, images_of_ids, value_at
from llava_core.tables.questions import (
    ANSWERS,
    IMAGE_ID,
    QUESTION,
    Row,
    answers_of,
    listed,
    options_of,
    question_rows,
    text_of,
)
from llava_core.tables.shown import shown
from llava_core.tables.table_files import open_table
from llava_core.types import JsonDict
from llava_core.vision.image_files import is_url

Kind = Literal["multiple choice", "yes or no", "short answers"]
IDS = ("index", "question_id", "questionid", "id")
"""Columns of the questions' names, the preferred first."""
HINT = "hint"
"""Column of what is said before a question."""
TEN = 10
"""Answers by as many people are what VQA accuracy is defined for."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions of one kind."""

    kind: Kind
    questions: list[JsonDict]
    """What a line of the output says of each: `task`, `row`, `id`, `question` with its hint, `options` by
    their letters, and `answer`, the letter, yes or no, or else `answers`."""
    categories: list[str]
    """The category of each question; "" where that is not known."""
    files: list[tuple[Path, int]]
    """The files and their rows: the questions in their order."""
    images: list[Callable[[int], Any]]
    """What each file has as the image of a row."""

    def image(self, number: int, folder: Path | None) -> str | LlavaError:
        """The image of a question as a data URL, an address, or a path from `folder` or the file's own."""
        for (path, rows), value in zip(self.files, self.images, strict=True):
            if number < rows:
                return _image(value, number, folder or path.parent)
            number -= rows
        raise IndexError(number)


def read_task(pattern: str, category: str, images_at: Path | None) -> Task:
    """The questions of all files that match; `images_at` may hold images by id, for files that name those.

    Raises LlavaError for a file without images, questions or answers, for an answer that is none of its
    options, or if the files are of different kinds.
    """
    questions, categories, files, images, kinds = [], list[str](), list[tuple[Path, int]](), [], set[Kind]()
    for path in matching(pattern):
        table = open_table(path)
        if not table.rows:
            raise LlavaError(f"{path} has no rows")
        names = {name.lower(): name for name in table.names}
        column = next((name for name in ("image", *IMAGES) if name in names), None)
        by_id = column is None and IMAGE_ID in names
        with_answers = QUESTION in names and names.keys() & {*ANSWERS}
        if not with_answers or (column is None and not (by_id and images_at)):
            expected = "columns image or image_path, question, answer or answers; and A, B, … or options"
            do = "lay it out as VLMEvalKit's TSV or lmms-eval's parquet files are"
            if by_id:
                do = "give --images the table of its images, with columns id and image"
            got = ", ".join(table.names[:20]) or "no column"
            raise LlavaError(f"{path} is no benchmark", expected=expected, got=got, do=do)
        if category != "category" and category.lower() not in names:
            raise LlavaError(f"{path} has no column {category!r}", got=", ".join(table.names), exit_code=2)
        rows = question_rows(table, table.rows, (*IDS, HINT, category.lower()))
        categories += [text_of(row.get(category.lower())) for row in rows]
        kind, found = _questions(path, rows)
        questions += found
        files.append((path, table.rows))
        if column is not None:
            images.append(value_at(table, names[column]))
        elif images_at is not None:
            images.append(images_of_ids(images_at, table.values(names[IMAGE_ID], table.rows)))
        kinds.add(kind)
    if len(kinds) > 1:
        got = " and ".join(sorted(kinds))
        raise LlavaError(f"--task {pattern}", expected="files of one kind", got=got, do="name one of them")
    (kind,) = kinds
    say(f"{counted(len(questions), 'question')} in {counted(len(files), 'file')}: {kind}")
    return Task(kind, questions, categories, files, images)


def _questions(path: Path, rows: Sequence[Row]) -> tuple[Kind, list[JsonDict]]:
    options, answers = [options_of(row) for row in rows], [answers_of(row) for row in rows]
    found = []
    for number, row in enumerate(rows):
        asked = text_of(row[QUESTION]).replace(IMAGE_MARK, "").strip()
        if not asked:
            raise LlavaError(f"row {number} of {path} has no question")
        told = (text for text in (text_of(row.get(HINT)), asked) if text not in ("", "nan"))
        name = next((row[name] for name in IDS if row.get(name) is not None), number)
        line = {"task": path.name, "row": number, "id": text_of(name)}
        found.append({**line, "question": "\n".join(told)})
    if not any(answers):
        do = "take a split with answers, such as DEV"
        raise LlavaError(f"{path} has no answers", got="an empty column", do=do)
    if any(options):
        right = _right_options(path, options, answers)
        extra: list[JsonDict] = [
            {"options": texts, "answer": letter} for texts, letter in zip(options, right, strict=True)
        ]
        return "multiple choice", _with(found, extra)
    said = [yes_or_no(texts[0]) if len(texts) == 1 else None for texts in answers]
    if all(word or not texts for word, texts in zip(said, answers, strict=True)):
        return "yes or no", _with(found, [{"answer": word} for word in said])
    return "short answers", _with(found, [{"answers": texts} for texts in answers])


def _with(found: Sequence[JsonDict], extra: Sequence[JsonDict]) -> list[JsonDict]:
    """Lines with what is known of their answers; nothing where that is not known."""
    pairs = zip(found, extra, strict=True)
    return [{**line, **{name: value for name, value in more.items() if value}} for line, more in pairs]


def _right_options(
    path: Path, options: Sequence[dict[str, str]], answers: Sequence[list[str]]
) -> list[str | None]:
    """Letter of each right option, which a file names by letter, by number from 0, or by its text.

    Raises LlavaError for a row with fewer than two options or several answers, or if no reading, or more than
    one, fits all rows.
    """
    for number, (texts, right) in enumerate(zip(options, answers, strict=True)):
        if len(texts) < 2 or len(right) > 1:
            got = f"{counted(len(texts), 'option')} and {counted(len(right), 'answer')}"
            expected = "two options or more, and one answer"
            raise LlavaError(f"row {number} of {path}", expected=expected, got=got)
    given = [right[0] if right else None for right in answers]
    readings = [
        [answer and read(texts, answer) for texts, answer in zip(options, given, strict=True)]
        for read in (_by_letter, _by_number, _by_text)
    ]
    whole = [found for found in readings if found.count(None) == given.count(None)]
    if not whole:
        best = min(readings, key=lambda found: found.count(None))
        number = next(k for k, answer in enumerate(given) if answer and not best[k])
        what = f"the answer in row {number} of {path} is none of its options"
        expected = f"one of {', '.join(options[number])}, the text of one, or its number from 0"
        raise LlavaError(what, expected=expected, got=shown(given[number]))
    if any(found != whole[0] for found in whole[1:]):
        do = "write letters, A for the first option"
        raise LlavaError(f"the answers of {path} are both texts of options and numbers from 0", do=do)
    return whole[0]


def _by_letter(options: dict[str, str], answer: str) -> str | None:
    return answer.upper() if answer.upper() in options else None


def _by_number(options: dict[str, str], answer: str) -> str | None:
    return [*options][int(answer)] if answer.isdecimal() and int(answer) < len(options) else None


def _by_text(options: dict[str, str], answer: str) -> str | None:
    letters = [letter for letter, text in options.items() if text == answer]
    return letters[0] if len(letters) == 1 else None


def _image(value: Callable[[int], Any], row: int, folder: Path) -> str | LlavaError:
    try:
        found = value(row)
        found = listed(found) or found
        body = image_bytes(found)
    except OSError as error:
        return LlavaError("cannot read its image", got=error)
    if body is not None:
        return f"data:image;base64,{base64.b64encode(body).decode()}"
    ref, several = image_ref(found)
    if several:
        return LlavaError("a question about several images", expected="one")
    if not ref:
        return LlavaError("a question without an image")
    return ref if is_url(ref) else str(folder / ref)
