"""The words of a row as files, which `extract run` reads back as they are."""

from __future__ import annotations

import json

from llava_core.shards.dialogue import Dialogue
from llava_core.tables.conversations import IMAGE_MARK


def words_value(words: Dialogue) -> str | list[str] | list[dict[str, str]]:
    """A caption, a list of captions, or [{role, content}, …], as `tables.words` reads them."""
    answers = [answer for _, answer in words.turns]
    if words.system is None and all(question is None for question, _ in words.turns):
        return answers[0] if len(answers) == 1 else answers
    system = [] if words.system is None else [{"role": "system", "content": words.system}]
    return [
        *system,
        *(
            {"role": role, "content": content}
            for question, answer in words.turns
            for role, content in (("user", question or IMAGE_MARK), ("assistant", answer))
        ),
    ]


def words_file(words: Dialogue) -> tuple[str, str]:
    """Suffix and text of the file of these words: .txt for a caption, .json for all others."""
    value = words_value(words)
    if isinstance(value, str):
        return ".txt", value
    return ".json", json.dumps(value, ensure_ascii=False, indent=1)
