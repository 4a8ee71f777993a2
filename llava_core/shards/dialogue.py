"""Dialogues about an image as JSON text, which a shard of conversations stores in place of a caption."""

from __future__ import annotations

import json
from collections.abc import Sequence

Turns = tuple[tuple[str | None, str], ...]
"""(question, answer) of each turn; for the question None, an instruction is drawn at random."""


def turns_to_text(turns: Sequence[tuple[str | None, str]]) -> str:
    """Turns as compact JSON: [["question","answer"],[null,"answer"]]."""
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


def turns_from_text(text: str) -> Turns:
    """Turns from their JSON. Raises ValueError for anything that `turns_to_text` does not write."""
    turns = json.loads(text)
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise ValueError("not a list of [question, answer]")
    return tuple((question, answer) for question, answer in turns)


def stored_turns(text: str, conversations: bool) -> Turns:
    """Turns of a row from its text, a dialogue or a caption; none if that is empty. Raises ValueError."""
    if conversations and text:
        return turns_from_text(text)
    return ((None, text),) if text.strip() else ()


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, list) or len(turn) != 2:
        return False
    return isinstance(turn[0], str | None) and isinstance(turn[1], str)
