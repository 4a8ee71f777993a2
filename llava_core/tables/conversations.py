"""Dialogues in data sets: LLaVA's and ShareGPT's {from, value}, and OpenAI's {role, content}."""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_core.shards.dialogue import Dialogue
from llava_core.tables.shown import shown

IMAGE_MARK = "<image>"
"""LLaVA's placeholder of the image; here the image always comes first."""
MEDIA_MARKS = (IMAGE_MARK, "<img>", "<video>", "<audio>")
"""Marks of what a dialogue is about besides its text."""
QUESTION, ANSWER, SYSTEM = "question", "answer", "system"
ROLES = {"human": QUESTION, "user": QUESTION, "gpt": ANSWER, "assistant": ANSWER, "system": SYSTEM}


class UnknownRole(ValueError):
    """A message by nobody in ROLES, such as a tool."""


def conversation_turns(messages: list[dict[str, Any]]) -> Dialogue | None:
    """A dialogue; None unless questions and answers alternate and no answer is empty.

    Image marks are dropped. A question that is then empty becomes None: training takes an instruction of its
    own. System messages, wherever they stand, become one before the first turn. Raises UnknownRole.
    """
    parts = [(_role(message), _text(message)) for message in messages]
    system = "\n".join(text.strip() for role, text in parts if role == SYSTEM and text and text.strip())
    parts = [(role, text) for role, text in parts if role != SYSTEM]
    count = len(parts) // 2
    if not count or [role for role, _ in parts] != [QUESTION, ANSWER] * count:
        return None
    texts = [text for _, text in parts if text is not None]
    questions = [text.replace(IMAGE_MARK, "").strip() for text in texts[::2]]
    answers = [text.strip() for text in texts[1::2]]
    if len(texts) < len(parts) or not all(answers):
        return None
    turns = tuple((question or None, answer) for question, answer in zip(questions, answers, strict=True))
    return Dialogue(turns, system or None)


def query_messages(history: Any, query: Any, answer: Any) -> list[dict[str, Any]] | None:
    """ms-swift's row as messages; `history` holds [query, answer] or messages, or the row is None."""
    messages: list[dict[str, Any]] = []
    for turn in [*(history if isinstance(history, list) else [history] if history else ()), [query, answer]]:
        if isinstance(turn, dict):
            messages.append(turn)
        elif isinstance(turn, (list, tuple)) and len(turn) == 2:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        else:
            return None
    return messages


def with_system(words: Any, value: object) -> Any:
    """Words of a row; a dialogue also with the system message that ms-swift and ShareGPT keep in a column."""
    value = decoded(value)
    if not isinstance(words, Dialogue) or not isinstance(value, str):
        return words
    return dataclasses.replace(words, system="\n".join(filter(None, (value.strip(), words.system))) or None)


def decoded(value: Any) -> Any:
    """Bytes, as columns of text are read, as text; anything else as it is."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def names_media(value: object) -> bool:
    """Whether a dialogue, at any depth of a value, has a mark of an image, a video or a sound in its text."""
    if isinstance(value, dict):
        return value.get("type", "text") != "text" or any(map(names_media, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(names_media, value))
    text = decoded(value)
    return isinstance(text, str) and any(mark in text for mark in MEDIA_MARKS)


def _text(message: dict[str, Any]) -> str | None:
    """Text of a message, which may be a list of content parts; None if it has none."""
    content = decoded(message.get("value", message.get("content")))
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [IMAGE_MARK if part.get("type") != "text" else part.get("text") for part in content]
        return "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def _role(message: dict[str, Any]) -> str:
    role = message.get("from", message.get("role"))
    role = role.lower() if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise UnknownRole(f"unknown role {shown(role)}")
    return ROLES[role]
