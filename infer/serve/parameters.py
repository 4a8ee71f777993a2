"""The parameters of requests: each one of OpenAI's API is honoured, harmless, or refused by name.

https://platform.openai.com/docs/api-reference. A parameter that is unknown, or that asks for what this server
does not do, is an error: no answer is given without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

from infer.serve.api_error import ApiError
from llava_core.errors import LlavaError, nearest
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

MAX_STOPS = 16
"""Stop texts of a request."""
MAX_TOP_LOGPROBS = 20
NUMBERS: dict[str, tuple[type[int] | type[float], str]] = {
    "temperature": (float, "temperature"), "top_p": (float, "top_p"), "top_k": (int, "top_k"),
    "repetition_penalty": (float, "repetition_penalty"), "seed": (int, "seed"),
    "max_tokens": (int, "max_tokens"), "max_completion_tokens": (int, "max_tokens"),
    "max_output_tokens": (int, "max_tokens"),
}  # fmt: skip
"""Type, and field of the sampling, by parameter; null is the server's default."""

Support = Literal["honoured", "harmless"] | tuple[object, ...]
"""A tuple holds the values that change nothing, as many clients send them; any other is refused."""


def _all(support: Support, *names: str) -> dict[str, Support]:
    return dict.fromkeys(names, support)


NO_THINKING = {"enable_thinking": False}
GENERATION: dict[str, Support] = {
    **_all("honoured", "model", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "stop"),
    **_all("honoured", "repetition_penalty", "top_logprobs"),
    **_all("harmless", "user", "metadata", "safety_identifier", "parallel_tool_calls"),
    **_all("harmless", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    **_all((False,), "store", "background", "ignore_eos", "use_beam_search", "echo", "enable_thinking"),
    **_all((0,), "frequency_penalty", "presence_penalty", "min_p", "min_tokens"),
    **_all((1,), "best_of", "length_penalty"),
    **_all(([],), "tools", "functions", "stop_token_ids"),
    **_all(("none", "auto"), "tool_choice", "function_call"),
    **_all(({},), "logit_bias", "moderation"),
    "service_tier": ("auto", "default"),
    "chat_template_kwargs": ({}, NO_THINKING),
    "skip_special_tokens": (True,),
}
"""Parameters of every request for an answer, OpenAI's and those of other servers."""
CHAT: dict[str, Support] = {
    **GENERATION,
    **_all("honoured", "messages", "n", "max_tokens", "max_completion_tokens", "logprobs", "response_format"),
    **_all("honoured", "continue_final_message", "add_generation_prompt"),
    "prediction": "harmless",  # it makes an answer come sooner
    **_all((), "audio", "web_search_options"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Parameters of `/v1/chat/completions`."""
RESPONSES: dict[str, Support] = {
    **GENERATION,
    **_all("honoured", "input", "instructions", "max_output_tokens", "text", "include"),
    **_all((), "previous_response_id", "conversation", "prompt", "max_tool_calls", "image"),
    **_all(({},), "access_programs", "background_options"),
    "context_management": ([],),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
}
"""Parameters of `/v1/responses`."""
EMBEDDINGS: dict[str, Support] = {
    **_all("honoured", "model", "input", "encoding_format", "dimensions"),
    "user": "harmless",
}
"""Parameters of `/v1/embeddings`."""
LENS: dict[str, Support] = {**_all("honoured", "model", "input", "top"), "user": "harmless"}
"""Parameters of `/v1/lens`."""
FORMAT: dict[str, Support] = {
    "type": ("text", "json_object"),
    **_all((), "json_schema", "name", "description", "schema", "strict"),
}
STREAM_OPTIONS: dict[str, Support] = {"include_usage": "honoured", "include_obfuscation": (False,)}


def read_body(body: bytes, table: Mapping[str, Support], model: str) -> JsonDict:
    """The parameters of a request to `model`. Raises ApiError for a body that is no such request."""
    try:
        fields = json.loads(body)
        body.decode().encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is no JSON object")
    if (asked := fields.get("model")) is None:
        code = "missing_required_parameter"
        raise ApiError(400, f"model is missing; use {model!r}", param="model", code=code)
    if asked != model:
        message = f"no model {repr(asked)[:80]} here; use {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    require_supported(fields, table)
    return fields


def require_supported(fields: JsonDict, table: Mapping[str, Support], where: str = "") -> None:
    """Raise ApiError for a parameter that is unknown, or that asks for what is not done here."""
    for name, value in fields.items():
        support = table.get(name)
        if value is None or support in ("honoured", "harmless"):
            continue
        if support is None:
            known = sorted(name for name, support in table.items() if support == "honoured")
            message = f"unknown field {name[:80]!r}; {nearest(name, known)}"
            raise ApiError(400, message, param=where + name, code="unknown_parameter")
        if value not in support:
            message = f"{where}{name} is not supported here, got {repr(value)[:80]}; leave it out"
            raise ApiError(400, message, param=where + name, code="unsupported_parameter")


def number(fields: JsonDict, name: str, kind: type[int] | type[float] = int) -> Any:
    """A number, or None. A whole one may be 64.0, as some languages write all numbers."""
    value = fields.get(name)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    wanted = int if kind is int else (int, float)
    if value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
        expected = "a whole number" if kind is int else "a number"
        raise ApiError(400, f"{name}: expected {expected}, got {value!r}", param=name)
    return value


def number_between(fields: JsonDict, name: str, least: int, most: int) -> int | None:
    """A whole number from `least` to `most`, or None."""
    value: int | None = number(fields, name)
    if value is not None and not least <= value <= most:
        raise ApiError(400, f"{name}: expected {least} to {most}, got {value}", param=name)
    return value


def switch(fields: JsonDict, name: str, where: str = "") -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: expected true or false, got {value!r}", param=where + name)
    return value is True


def mapping(fields: JsonDict, name: str, where: str = "") -> JsonDict:
    """A JSON object; empty if there is none."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name}: expected an object, got {repr(value)[:80]}", param=where + name)
    return value or {}


def is_text(value: object) -> TypeGuard[str]:
    # Half a character is none: it cannot be encoded.
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def include_usage(fields: JsonDict) -> bool:
    options = mapping(fields, "stream_options")
    require_supported(options, STREAM_OPTIONS, "stream_options.")
    return switch(options, "include_usage", "stream_options.")


def is_json_object(wanted: JsonDict, where: str) -> bool:
    """Whether `response_format`, or `text.format`, asks for a JSON object."""
    require_supported(wanted, FORMAT, f"{where}.")
    return wanted.get("type") == "json_object"


def read_sampling(fields: JsonDict, defaults: Sampling) -> Sampling:
    changes: dict[str, Any] = {}
    for name, (kind, field) in NUMBERS.items():
        if (value := number(fields, name, kind)) is not None:
            changes[field] = value
    if changes.get("seed") == -1:  # a random one, as without a seed
        del changes["seed"]
    stop = fields.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(map(is_text, stops)):
            raise ApiError(400, f"stop: expected a text or up to {MAX_STOPS} of them", param="stop")
        changes["stop"] = tuple(stops)
    try:
        return dataclasses.replace(defaults, **changes)
    except LlavaError as error:
        raise ApiError(400, error, param=str(error).split(";")[0]) from None
