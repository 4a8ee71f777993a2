"""Messages of a request: texts, one image, calls of tools, their results, the beginning of an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from infer.serve.api_error import ApiError
from infer.serve.parameters import Support, is_text, require_supported
from llava_core.data_url import decode_base64, decode_data_url, is_data_url
from llava_core.types import JsonDict

PARTS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image_url": "image_url", "input_image": "image_url", "image": "image",
}  # fmt: skip
"""Key of the text, or of the image's URL, by the type of a content part."""
EMPTY: tuple[object, ...] = ("", [], {})
MESSAGE: dict[str, Support] = {
    **dict.fromkeys(("role", "content", "tool_calls", "tool_call_id"), "honoured"),
    **dict.fromkeys(("type", "id", "status", "phase", "prefix", "cache_control"), "harmless"),
    **dict.fromkeys(("name", "refusal", "annotations", "audio", "function_call", "reasoning_content"), EMPTY),
}
"""Fields of a message: a client sends an answer back as it got it."""


@dataclasses.dataclass(frozen=True)
class Messages:
    turns: list[JsonDict]
    """Messages as the chat template takes them, without the image; the last is the user's, or a tool's."""
    image: str | None = None
    """Data URL or address of the image."""
    prefill: str = ""
    """What the answer begins with."""


def read_messages(given: object, name: str = "messages") -> Messages:
    """The messages of a request. Raises ApiError, which names the field `name`."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, f"{name} is no list of messages", param=name)
    turns: list[JsonDict] = []
    images: list[str] = []
    for index, message in enumerate(given):
        turns.append(_turn(message, f"{name}[{index}]", images, turns))
    if len(set(images)) > 1:
        # The layout has one image, before all text: an earlier one would be dropped in silence.
        raise ApiError(400, "one image in each conversation; begin a new one", param=name)
    image = images[0] if images else None
    last = turns[-1]
    if last["role"] == "system" or last.get("tool_calls"):
        raise ApiError(400, "the last message must be the user's, a tool's, or begin the answer", param=name)
    if last["role"] != "assistant":
        return Messages(turns, image)
    if len(turns) == 1 or turns[-2]["role"] == "assistant":
        raise ApiError(400, "the beginning of an answer must follow a question", param=name)
    return Messages(turns[:-1], image, last["content"])


def _turn(message: object, where: str, images: list[str], before: Sequence[JsonDict]) -> JsonDict:
    """One message for the template; its images are added to `images`."""
    if not isinstance(message, dict):
        raise ApiError(400, "a message is no JSON object", param=where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        expected = "system, developer, user, assistant or tool"
        raise ApiError(400, f"role: expected {expected}, got {role!r}", param=f"{where}.role")
    require_supported(message, {**MESSAGE, "name": "honoured"} if role == "tool" else MESSAGE, f"{where}.")
    texts = []
    for kind, value in _parts(message.get("content"), f"{where}.content"):
        if kind == "text":
            texts.append(value)
        elif role == "user":
            images.append(value)
        else:
            raise ApiError(400, "only the user can show an image", param=f"{where}.content")
    turn: JsonDict = {"role": role, "content": "\n".join(texts)}
    if (calls := message.get("tool_calls")) not in (None, []):
        if role != "assistant":
            raise ApiError(400, "only the assistant can call a tool", param=f"{where}.tool_calls")
        turn["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    if role == "tool":
        made = [call["id"] for turn in before for call in turn.get("tool_calls", ())]
        if (call := message.get("tool_call_id")) not in made:
            got = f"tool_call_id: expected that of a call in an earlier message, got {call!r}"
            raise ApiError(400, got, param=f"{where}.tool_call_id")
        turn["tool_call_id"] = call
        if is_text(message.get("name")):
            turn["name"] = message["name"]
    return turn


def _tool_calls(given: object, where: str) -> list[JsonDict]:
    """Calls of functions with their arguments as objects, as chat templates take them."""
    calls = []
    for index, call in enumerate(given if isinstance(given, list) else [given]):
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name, identity = function.get("name"), call.get("id")
        if not is_text(name) or not is_text(identity) or call.get("type") not in (None, "function"):
            expected = 'expected {"id", "type": "function", "function": {"name", "arguments"}}'
            raise ApiError(400, f"{expected}, got {repr(call)[:80]}", param=f"{where}[{index}]")
        try:
            arguments: Any = json.loads(function["arguments"])
        except (KeyError, TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict) or not is_text(function["arguments"]):
            got = repr(function.get("arguments"))[:80]
            place = f"{where}[{index}].function.arguments"
            raise ApiError(400, f"arguments: expected a JSON object as text, got {got}", param=place)
        calls.append({"type": "function", "id": identity, "function": {"name": name, "arguments": arguments}})
    return calls


def _parts(content: object, where: str) -> Iterator[tuple[str, str]]:
    """("text", text) and ("image", URL) of a message, in their order."""
    if content is None:
        return
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ApiError(400, "content is neither text nor a list of parts", param=where)
    for index, part in enumerate(parts):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        yield read_part(part, f"{where}[{index}]")


def read_part(part: object, where: str) -> tuple[str, str]:
    """("text", text) or ("image", URL) of a content part."""
    kind = part.get("type") if isinstance(part, dict) else None
    key = PARTS.get(kind) if isinstance(kind, str) else None
    if key is None or not isinstance(part, dict):
        expected = f"a part of type {', '.join(PARTS)}"
        raise ApiError(400, f"expected {expected}, got {kind!r}", param=where)
    value = part.get(key)
    if key != "text" and isinstance(value, dict):
        value = value.get("url")
    if not is_text(value) or (key != "text" and not value.strip()):
        expected, got = "text" if key == "text" else "a data URL or an address", repr(value)[:80]
        raise ApiError(400, f"{key}: expected {expected}, got {got}", param=f"{where}.{key}")
    return ("text", value) if key == "text" else ("image", value.strip())


def read_image_text(text: str, max_bytes: int) -> bytes:
    """The image file in a data URL, or in base64 alone. Raises ApiError if there is none, or too large."""
    try:
        image = decode_data_url(text) if is_data_url(text) else decode_base64(text)
    except ValueError:
        got = f"cannot read the image {text[:24]!r}..."
        message = f"{got}; expected a data URL (data:image/...;base64,...), an address or base64"
        raise ApiError(400, message, param="messages", code="invalid_image_url") from None
    if len(image) > max_bytes:
        raise ApiError(413, f"an image may have {max_bytes:,} bytes", param="messages")
    return image
