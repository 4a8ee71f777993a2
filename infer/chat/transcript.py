"""A saved dialogue: a JSON file of the image's path or URL and the turns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.filesystem import replace_text

FORMAT = "llava-align chat/1"


@dataclasses.dataclass(frozen=True)
class Transcript:
    image: str | None
    """Path or URL; None for a dialogue without an image."""
    messages: Sequence[dict[str, str]]
    """{"role": "user"|"assistant", "content": text} alternately, an answer last."""


def write_transcript(path: Path, transcript: Transcript) -> None:
    """Write the file atomically. Raises LlavaError instead of replacing a file that is not a transcript."""
    if path.exists():
        read_transcript(path)
    content = {"format": FORMAT, "image": transcript.image, "messages": list(transcript.messages)}
    replace_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_transcript(path: Path) -> Transcript:
    """The saved dialogue. Raises LlavaError for a file that `write_transcript` has not written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError
        transcript = Transcript(content["image"], content["messages"])
        json.dumps(content, ensure_ascii=False).encode()  # half a character is no text
        if not isinstance(transcript.image, str | None) or not _alternate(transcript.messages):
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):  # UnicodeDecodeError among them
        raise LlavaError(f"{path} is no saved chat", expected=f"a file of /save ({FORMAT})") from None
    return transcript


def _alternate(messages: Sequence[dict[str, str]]) -> bool:
    """Whether messages are questions and answers alternately, an answer last, and all of them text."""
    roles = [message["role"] for message in messages]
    return roles == ["user", "assistant"] * (len(roles) // 2) and all(
        set(message) == {"role", "content"} and isinstance(message["content"], str) for message in messages
    )
