"""Dialogues in data sets: LLaVA's {from, value} and OpenAI's {role, content}."""

from __future__ import annotations

from llava_core.errors import LlavaError
from llava_core.shards.dialogue import turns_to_text

IMAGE_MARK = "<image>"
"""LLaVA's placeholder of the image; here the image always comes first."""
QUESTION, ANSWER, SYSTEM = "question", "answer", "system"
ROLES = {"human": QUESTION, "user": QUESTION, "gpt": ANSWER, "assistant": ANSWER, "system": SYSTEM}


def conversation_text(messages: object, where: str) -> str | None:
    """A dialogue as a shard keeps it; None unless questions and answers alternate and no answer is empty.

    Image marks and system messages are dropped. A question that is then empty becomes None: training takes an
    instruction of its own. Raises LlavaError, which names `where`, for a role not in ROLES.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    parts = [(_role(message, where), message.get("value", message.get("content"))) for message in messages]
    parts = [(role, text) for role, text in parts if role != SYSTEM]
    turns = len(parts) // 2
    if not turns or [role for role, _ in parts] != [QUESTION, ANSWER] * turns:
        return None
    texts = [text for _, text in parts if isinstance(text, str)]
    questions = [text.replace(IMAGE_MARK, "").strip() for text in texts[::2]]
    answers = [text.strip() for text in texts[1::2]]
    if len(texts) < len(parts) or not all(answers):
        return None
    return turns_to_text([(q or None, a) for q, a in zip(questions, answers, strict=True)])


def _role(message: dict[str, object], where: str) -> str:
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role not in ROLES:
        raise LlavaError(f"{where}: unknown role {role!r}", expected=f"one of {', '.join(ROLES)}")
    return ROLES[role]
