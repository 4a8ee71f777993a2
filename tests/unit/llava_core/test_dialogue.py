"""Dialogues as JSON text in a shard."""

from __future__ import annotations

import pytest

from llava_core.shards.dialogue import SYSTEM_START, Dialogue, dialogue_from_text, turns_to_text

TURNS = ((None, "一只猫"), ("why?", "so"))


def test_text_without_a_system_message_is_as_it_ever_was() -> None:
    assert turns_to_text(TURNS) == '[[null,"一只猫"],["why?","so"]]'
    assert dialogue_from_text(turns_to_text(TURNS)) == Dialogue(TURNS)


def test_a_system_message_comes_first() -> None:
    text = turns_to_text(TURNS, "短")
    assert text == '[{"system":"短"},[null,"一只猫"],["why?","so"]]'
    assert text.startswith(SYSTEM_START)
    assert dialogue_from_text(text) == Dialogue(TURNS, "短")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '[{"system":"s"}]', '[{"system":1},["q","a"]]', '[{"role":"s"},["q","a"]]', '[["q"]]',
     '[["q","a"],{"system":"s"}]'],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        dialogue_from_text(text)
