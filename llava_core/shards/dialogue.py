"""Dialogues about an image as JSON text, which a shard of conversations stores in place of a caption."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

Turns = tuple[tuple[str | None, str], ...]
"""(question, answer) of each turn; for the question None, an instruction is drawn at random."""
SYSTEM_START = '[{"system":'
"""How the text of a dialogue with a system message begins."""


@dataclasses.dataclass(frozen=True)
class Dialogue:
    turns: Turns
    system: str | None = None
    """The system message before the first turn, if there is one."""


def turns_to_text(turns: Sequence[tuple[str | None, str]], system: str | None = None) -> str:
    """A dialogue as compact JSON: [["question","answer"],[null,"answer"]]; a system message comes first, as
    {"system":"..."}."""
    items = [*([{"system": system}] if system is not None else ()), *turns]
    return json.dumps(items, ensure_ascii=False, separators=(",", ":"))


def dialogue_from_text(text: str) -> Dialogue:
    """A dialogue from its JSON. Raises ValueError for anything that `turns_to_text` does not write."""
    items = json.loads(text)
    system = None
    if isinstance(items, list) and items and isinstance(items[0], dict):
        first, *items = items
        system = first.get("system")
        if len(first) != 1 or not isinstance(system, str):
            raise ValueError("not a system message")
    if not isinstance(items, list) or not items or not all(map(_is_turn, items)):
        raise ValueError("not a list of [question, answer]")
    return Dialogue(tuple((question, answer) for question, answer in items), system)


def stored_dialogue(text: str, conversations: bool) -> Dialogue:
    """What a row's text is, a dialogue or a caption; without turns if it is empty. Raises ValueError."""
    if conversations and text:
        return dialogue_from_text(text)
    return Dialogue(((None, text),) if text.strip() else ())


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, list) or len(turn) != 2:
        return False
    return isinstance(turn[0], str | None) and isinstance(turn[1], str)
