"""OpenAI's chat completions API: parsing of requests, and the JSON of answers and errors.

https://platform.openai.com/docs/api-reference/chat. A field that is unknown, or that would change the answer
if it were supported, is an error.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from llava_core.data_url import decode_base64, decode_data_url, is_data_url
from llava_core.errors import LlavaError, nearest
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

MAX_STOPS = 16
"""Stop texts of a request."""
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Error types by HTTP status; other 4xx are `invalid_request_error`, 5xx `server_error`."""

NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float, "top_p": float, "repetition_penalty": float, "top_k": int, "seed": int,
    "max_tokens": int, "max_completion_tokens": int,
}  # fmt: skip
"""Fields of the sampling; null is the server's default."""
KNOWN = {*NUMBERS, "model", "messages", "n", "stop", "stream", "stream_options"}
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "prediction", "reasoning_effort", "verbosity"),
}
"""Fields of OpenAI's API that are ignored: what they ask for does not concern the text of an answer here."""
NO_THINKING = {"enable_thinking": False}
WITHOUT_EFFECT_AT: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "min_p": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "enable_thinking": (False,), "chat_template_kwargs": ({}, NO_THINKING),
    "ignore_eos": (False,), "skip_special_tokens": (True,), "add_generation_prompt": (True,),
    "best_of": (1,), "use_beam_search": (False,), "length_penalty": (1,), "min_tokens": (0,),
    "stop_token_ids": ([],), "echo": (False,),
}  # fmt: skip
"""Fields that are not supported, and the values at which they change nothing, as many clients send them."""
PARTS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image_url": "image_url", "input_image": "image_url", "image": "image",
}  # fmt: skip
"""Key of the text, or of the image's URL, by the type of a content part."""


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
    _require_known(fields)
    if _number(fields, "n", int) not in (None, 1):
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
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        key = PARTS.get(kind) if isinstance(kind, str) else None
        if key is None:
            expected = f"a part of type {', '.join(PARTS)}"
            raise ApiError(400, f"expected {expected}, got {kind!r}", param=f"{where}[{index}]")
        value = part.get(key)
        if key != "text" and isinstance(value, dict):
            value = value.get("url")
        if not _is_text(value) or (key != "text" and not value.strip()):
            expected, got = "text" if key == "text" else "a data URL or an address", repr(value)[:80]
            raise ApiError(400, f"{key}: expected {expected}, got {got}", param=f"{where}[{index}].{key}")
        yield ("text", value) if key == "text" else ("image", value.strip())


def _is_text(value: object) -> TypeGuard[str]:
    # Half a character is none: it cannot be encoded.
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def _sampling(fields: JsonDict, defaults: Sampling) -> Sampling:
    changes: dict[str, Any] = {}
    for name, kind in NUMBERS.items():
        if (value := _number(fields, name, kind)) is not None:
            changes["max_tokens" if name == "max_completion_tokens" else name] = value
    if changes.get("seed") == -1:  # a random one, as without a seed
        del changes["seed"]
    stop = fields.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(map(_is_text, stops)):
            raise ApiError(400, f"stop: expected a text or up to {MAX_STOPS} of them", param="stop")
        changes["stop"] = tuple(stops)
    try:
        return dataclasses.replace(defaults, **changes)
    except LlavaError as error:
        raise ApiError(400, error, param=str(error).split(";")[0]) from None


def _number(fields: JsonDict, name: str, kind: type[int] | type[float]) -> Any:
    """A field's number, or None. A whole one may be 64.0, as some languages write all numbers."""
    value = fields.get(name)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    wanted = int if kind is int else (int, float)
    if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
        expected = "a whole number" if kind is int else "a number"
        raise ApiError(400, f"{name}: expected {expected}, got {value!r}", param=name)
    return value


def _require_known(fields: JsonDict) -> None:
    """Raise ApiError for a field that this server does not know, or one that would change the answer."""
    for name, value in fields.items():
        if value is None or name in KNOWN or name in WITHOUT_EFFECT:
            continue
        if name not in WITHOUT_EFFECT_AT:
            message = f"unknown field {name[:80]!r}; {nearest(name, sorted(KNOWN))}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
        if value not in WITHOUT_EFFECT_AT[name]:
            message = f"{name} is not supported here, got {repr(value)[:80]}; leave it out"
            raise ApiError(400, message, param=name, code="unsupported_parameter")


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
    """One server-sent event, in ASCII: readers split lines at U+2028, or guess the encoding of text."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
