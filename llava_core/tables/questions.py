"""Questions with options or answers, as in the rows of VLMEvalKit's TSV and lmms-eval's parquet files."""

from __future__ import annotations

import collections
import string
from collections.abc import Sequence
from typing import Any

from llava_core.tables.conversations import decoded, query_messages
from llava_core.tables.table_files import Table
from llava_core.tables.words import literal

Row = dict[str, Any]
QUESTION = "question"
ANSWERS = ("answer", "answers")
"""Columns of right answers beside QUESTION, the preferred first; the second has those of several people."""
IMAGE_ID = "imageid"
"""Column of the images' ids in another table, as lmms-eval has GQA; in lower case."""
OPTION_LISTS = ("options", "choices")
"""Columns of a list of options."""
OPTION_COLUMNS = tuple(f"{prefix}{letter}" for prefix in ("", "choice_") for letter in string.ascii_lowercase)
"""Columns of one option each, A, B, … or choice_a, choice_b, …; of all these, case does not matter."""
ABSENT = ("", "nan")
"""Texts of an option that a row lacks; lmms-eval's copy of MMBench has the latter."""


def question_rows(table: Table, rows: int, more: Sequence[str] = ()) -> list[Row]:
    """The first rows of the columns of questions, answers and options, and of `more`; names in lower case."""
    wanted = {QUESTION, *ANSWERS, *OPTION_LISTS, *OPTION_COLUMNS, *more}
    columns = {name.lower(): table.values(name, rows) for name in table.names if name.lower() in wanted}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def listed(value: Any) -> list[Any] | None:
    """A list, or the one that a text is as JSON or a Python literal; None for anything else."""
    if isinstance(value, (str, bytes)) and value[:1] in ("[", b"["):
        value = literal(decoded(value).strip())
    return value if isinstance(value, list) else None


def options_of(row: Row) -> dict[str, str]:
    """Texts of a row's options by their letters; {} if it has none."""
    found = next((texts for name in OPTION_LISTS if (texts := listed(row.get(name)))), [])
    if not found:
        found = [row.get(letter, row.get(f"choice_{letter}")) for letter in string.ascii_lowercase]
    lettered = zip(string.ascii_uppercase, map(text_of, found), strict=False)
    return {letter: text for letter, text in lettered if text not in ABSENT}


def answers_of(row: Row) -> list[str]:
    """The right answers of a row, one or as many as people gave; [] if it has none."""
    value = next((row[name] for name in ANSWERS if text_of(row.get(name))), None)
    several = listed(value)
    answers = [value] if several is None else several
    texts = [text_of(each.get("answer") if isinstance(each, dict) else each) for each in answers]
    return [text for text in texts if text not in ABSENT]


def text_of(value: Any) -> str:
    return "" if value is None else str(decoded(value)).strip()


def words_in(row: Row, column: str) -> object:
    """The words of a row; a benchmark's answer, and ms-swift's, with what was asked."""
    if column in ANSWERS and QUESTION in row:
        return turn_of(row)
    if column == "response" and "query" in row:
        return query_messages(row.get("history"), row["query"], row[column])
    return row.get(column)


def turn_of(row: Row) -> list[Any] | None:
    """A question and its answer as messages; the answer is an option's text for its letter or number, or what
    most people gave."""
    answers, options = answers_of(row), options_of(row)
    if not answers:
        return None
    answer = collections.Counter(answers).most_common(1)[0][0]
    if isinstance(number := row.get("answer"), int) and 0 <= number < len(options):
        answer = [*options][number]
    return query_messages(None, row[QUESTION], options.get(answer, answer))
