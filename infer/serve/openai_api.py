"""OpenAI's chat completions API: parsing of requests, and the JSON of answers and errors.

https://platform.openai.com/docs/api-reference/chat. Fields that are not named here are ignored.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

MAX_STOPS = 16
"""Stop texts of a request."""
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Error types by HTTP status; other 4xx are `invalid_request_error`, 5xx `server_error`."""


class ApiError(Exception):
    """An error response with this HTTP status."""

    def __init__(self, status: int, message: object, *, param: str | None = None, code: str | None = None):
        super().__init__(str(message))
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> JsonDict:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    messages: list[dict[str, str]]
    """Messages as the chat template takes them, without the image."""
    image: str | None
    """Data URL or address of the image."""
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse_request(body: bytes, model: str, defaults: Sampling) -> ChatRequest:
    """A chat request from its JSON body. Raises ApiError for a body that is not a request to `model`."""
    try:
        fields = json.loads(body)
        body.decode().encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    if (asked := fields.get("model")) not in (None, model):
        raise ApiError(404, f"no model {asked!r} here; use {model!r}", param="model", code="model_not_found")
    if (n := fields.get("n")) is not None and (n != 1 or isinstance(n, bool)):
        raise ApiError(400, "one answer for each request; leave out n", param="n")
    messages, image = _messages(fields.get("messages"))
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, f"stream_options: expected an object, got {options!r}", param="stream_options")
    return ChatRequest(
        messages=messages,
        image=image,
        sampling=_sampling(fields, defaults),
        stream=_switch(fields, "stream"),
        include_usage=_switch(options or {}, "include_usage", "stream_options."),
    )


def _switch(fields: JsonDict, name: str, where: str = "") -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: expected true or false, got {value!r}", param=where + name)
    return value is True


def _messages(given: object) -> tuple[list[dict[str, str]], str | None]:
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages is no list of messages", param="messages")
    messages, images = [], []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ApiError(400, "a message is no JSON object", param=where)
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ("system", "user", "assistant"):
            expected = "system, developer, user or assistant"
            raise ApiError(400, f"role: expected {expected}, got {role!r}", param=f"{where}.role")
        texts = []
        for kind, value in _parts(message.get("content"), f"{where}.content"):
            if kind == "text":
                texts.append(value)
            elif role == "user":
                images.append(value)
            else:
                raise ApiError(400, "only the user can show an image", param=f"{where}.content")
        messages.append({"role": str(role), "content": "\n".join(texts)})
    if messages[-1]["role"] != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    if len(set(images)) > 1:
        # The layout has one image, before all text: an earlier one would be dropped in silence.
        raise ApiError(400, "one image in each conversation; begin a new one", param="messages")
    return messages, images[0] if images else None


def _parts(content: object, where: str) -> Iterator[tuple[str, str]]:
    """("text", text) and ("image", URL) of a message, in their order."""
    if content is None:
        return
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ApiError(400, "content is neither text nor a list of parts", param=where)
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image_url"):
            expected = "a part of type text or image_url"
            raise ApiError(400, f"expected {expected}, got {kind!r}", param=f"{where}[{index}]")
        value = part[kind] if kind in part else None
        if kind == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if not isinstance(value, str) or not _is_text(value):
            raise ApiError(400, f"no text in {kind}", param=f"{where}[{index}].{kind}")
        yield ("text", value) if kind == "text" else ("image", value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True


def _sampling(fields: JsonDict, defaults: Sampling) -> Sampling:
    changes: dict[str, Any] = {}
    numbers = {"temperature": float, "top_p": float, "top_k": int, "repetition_penalty": float, "seed": int}
    for name, kind in {**numbers, "max_tokens": int, "max_completion_tokens": int}.items():
        if (value := fields.get(name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            wanted = "a whole number" if kind is int else "a number"
            raise ApiError(400, f"{name}: expected {wanted}, got {value!r}", param=name)
        changes["max_tokens" if name == "max_completion_tokens" else name] = value
    stop = fields.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(_stops(text) for text in stops):
            raise ApiError(400, f"stop: expected a text or up to {MAX_STOPS} of them", param="stop")
        changes["stop"] = tuple(stops)
    try:
        return dataclasses.replace(defaults, **changes)
    except LlavaError as error:
        raise ApiError(400, error, param=str(error).split(";")[0]) from None


def _stops(text: object) -> bool:
    return isinstance(text, str) and bool(text) and _is_text(text)


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes in `data:image/png;base64,...`. Raises ApiError if there are none, or too many."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(
            400, "the image's data URL is not of the form data:image/...;base64,...", param="messages"
        )
    if len(data) > max_bytes * 4 // 3 + 4:
        raise ApiError(413, f"an image may have {max_bytes:,} bytes", param="messages")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ApiError(400, "the image's data URL holds no base64", param="messages") from None


@dataclasses.dataclass(frozen=True)
class Usage:
    prompt: int
    """Visual tokens, and tokens of the text in the template."""
    completion: int
    cached: int
    """Prompt tokens whose keys and values were in the cache."""

    def to_json(self) -> JsonDict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The JSON of one answer, whole or in chunks."""

    ident: str
    model: str
    include_usage: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, usage: Usage) -> JsonDict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage.to_json()}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> JsonDict:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def usage_chunk(self, usage: Usage) -> JsonDict:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_json()}

    def _head(self, kind: str) -> JsonDict:
        return {"id": self.ident, "object": kind, "created": self.created, "model": self.model}


def model_json(model: str, created: int) -> JsonDict:
    return {"id": model, "object": "model", "created": created, "owned_by": "llava-align"}


def list_json(models: Sequence[JsonDict]) -> JsonDict:
    return {"object": "list", "data": list(models)}


def event(content: JsonDict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
