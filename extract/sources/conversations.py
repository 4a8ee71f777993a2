"""Dialogues as data sets keep them: LLaVA's {from, value} and OpenAI's {role, content}."""

from __future__ import annotations

from llava_core.errors import LlavaError
from llava_core.shards.dialogue import turns_to_text

IMAGE_MARK = "<image>"
"""Where LLaVA puts the picture; here it always comes first."""
QUESTION, ANSWER, SYSTEM = "question", "answer", "system"
ROLES = {"human": QUESTION, "user": QUESTION, "gpt": ANSWER, "assistant": ANSWER, "system": SYSTEM}


def conversation_text(messages: object, where: str) -> str | None:
    """A dialogue as a shard keeps it; None unless questions and answers alternate and every answer has words.

    Image marks in questions go, a question of nothing else is left to the pool of instructions, and system
    messages are left out. Raises LlavaError, naming the place `where`, for a role that is none of ROLES.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    said = [(_role(message, where), message.get("value", message.get("content"))) for message in messages]
    said = [(role, words) for role, words in said if role != SYSTEM]
    turns = len(said) // 2
    if not turns or [role for role, _ in said] != [QUESTION, ANSWER] * turns:
        return None
    words = [text for _, text in said if isinstance(text, str)]
    questions = [text.replace(IMAGE_MARK, "").strip() for text in words[::2]]
    answers = [text.strip() for text in words[1::2]]
    if len(words) < len(said) or not all(answers):
        return None
    return turns_to_text([(q or None, a) for q, a in zip(questions, answers, strict=True)])


def _role(message: dict[str, object], where: str) -> str:
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise LlavaError(f"{where}: unknown role {role!r}", expected=f"one of {', '.join(ROLES)}")
    return ROLES[role]
