"""Dialogues as data sets keep them: LLaVA's {from, value} and OpenAI's {role, content}."""

from __future__ import annotations

from llava_core.dialogue import turns_to_text
from llava_core.errors import LlavaError

IMAGE_MARK = "<image>"
"""Where LLaVA puts the picture; here it always comes first."""
QUESTION, ANSWER, SYSTEM = "question", "answer", "system"
ROLES = {"human": QUESTION, "user": QUESTION, "gpt": ANSWER, "assistant": ANSWER, "system": SYSTEM}


def conversation_text(messages: object, where: str) -> str | None:
    """A dialogue as a shard keeps it; None unless questions and answers alternate and every answer has words.

    Image marks go, a question of nothing else is left to the pool of instructions, and system messages are
    left out. Raises LlavaError, naming the place `where`, for a role that is none of ROLES.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    said = [(_role(message, where), _words(message)) for message in messages]
    said = [(role, words) for role, words in said if role != SYSTEM]
    roles, words = [role for role, _ in said], [words for _, words in said]
    questions, answers = words[::2], words[1::2]
    if not answers or roles != [QUESTION, ANSWER] * len(answers) or None in questions or not all(answers):
        return None
    turns = [(question or None, str(answer)) for question, answer in zip(questions, answers, strict=True)]
    return turns_to_text(turns)


def _role(message: dict[str, object], where: str) -> str:
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise LlavaError(f"{where}: unknown role {role!r}", expected=f"one of {', '.join(ROLES)}")
    return ROLES[role]


def _words(message: dict[str, object]) -> str | None:
    words = message.get("value", message.get("content"))
    return words.replace(IMAGE_MARK, "").strip() if isinstance(words, str) else None
