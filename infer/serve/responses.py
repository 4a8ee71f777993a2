"""`POST /v1/responses`: its parameters, and the JSON of its answers. Nothing is stored.

https://platform.openai.com/docs/api-reference/responses and https://www.openresponses.org
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from infer.serve.answering import AnswerParameters
from infer.serve.api_error import ApiError
from infer.serve.chat_completions import logprob_json
from infer.serve.messages import read_messages
from infer.serve.parameters import (
    MAX_TOP_LOGPROBS,
    include_usage,
    is_json_object,
    is_text,
    mapping,
    number_between,
    read_sampling,
    require_supported,
    switch,
)
from infer.serve.request import TextDelta, Usage
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

LOGPROBS = "message.output_text.logprobs"
"""What `include` may name."""
REPEATED = ("prompt_cache_key", "safety_identifier")
"""Texts that a response repeats."""


def read_response(fields: JsonDict, defaults: Sampling, model: str) -> tuple[AnswerParameters, ResponseReply]:
    """A request for a response. Raises ApiError."""
    instructions = fields.get("instructions")
    if instructions is not None and not is_text(instructions):
        raise ApiError(400, f"instructions: expected text, got {instructions!r}", param="instructions")
    included = fields.get("include")
    if included not in (None, [], [LOGPROBS]):
        message = f"include: expected [{LOGPROBS!r}], got {repr(included)[:80]}"
        raise ApiError(400, message, param="include", code="unsupported_parameter")
    text = mapping(fields, "text")
    require_supported(text, {"format": "honoured", "verbosity": ("medium",)}, "text.")
    json = is_json_object(mapping(text, "format", "text."), "text.format")
    top = number_between(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not included:
        message = f"top_logprobs: expected include=[{LOGPROBS!r}] with it"
        raise ApiError(400, message, param="top_logprobs")
    include_usage(fields)  # every response has it
    for name, value in (*((name, fields.get(name)) for name in REPEATED), *_metadata(fields)):
        if value is not None and not is_text(value):
            raise ApiError(400, f"{name}: expected text, got {repr(value)[:80]}", param=name)
    messages = read_messages(_messages(fields.get("input")), "input")
    if instructions:
        system = {"role": "system", "content": instructions}
        messages = dataclasses.replace(messages, turns=[system, *messages.turns])
    asked = AnswerParameters(
        messages=messages,
        sampling=read_sampling(fields, defaults),
        stream=switch(fields, "stream"),
        json=json,
        top_logprobs=(top or 0) if included else None,
    )
    return asked, ResponseReply(f"resp_{uuid.uuid4().hex}", model, asked, fields)


def _metadata(fields: JsonDict) -> Iterator[tuple[str, object]]:
    """Keys and values, each with the name of the parameter."""
    for pair in mapping(fields, "metadata").items():
        yield from (("metadata", text) for text in pair)


def _messages(given: object) -> object:
    """Items of the input as messages of chat completions."""
    if is_text(given):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        return given
    messages: list[Any] = []
    for index, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind == "message":
            messages.append(item)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            )
        else:
            expected = "a message, function_call or function_call_output"
            raise ApiError(400, f"type: expected {expected}, got {kind!r}", param=f"input[{index}].type")
    return messages


class ResponseReply:
    """The JSON of one response, whole or as events."""

    def __init__(self, ident: str, model: str, asked: AnswerParameters, fields: JsonDict) -> None:
        """`fields` are the parameters of the request, some of which are repeated."""
        self._item_id, self._asked = f"msg_{uuid.uuid4().hex}", asked
        self._answer = TextDelta("")
        """What was streamed so far."""
        self._events = 0
        format_ = {"type": "json_object" if asked.json else "text"}
        sampling = asked.sampling
        self._head: JsonDict = {
            "id": ident,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": sampling.max_tokens if sampling.max_tokens > 0 else None,
            "metadata": fields.get("metadata") or {},
            "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
            **{name: fields.get(name) for name in REPEATED},
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "text": {"format": format_},
            # What is not done here, at the values that say so.
            "background": False,
            "frequency_penalty": 0,
            "max_tool_calls": None,
            "presence_penalty": 0,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
        }

    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> JsonDict:
        (answer,) = answers
        cut = answer.finish == "length"
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(answer)],
            "usage": _usage(usage),
        }

    def begin(self) -> Iterable[JsonDict]:
        begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
        begun |= {"completed_at": None, "incomplete_details": None}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = {**self._item(self._answer), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part_event("response.content_part.added", part=self._part(TextDelta("")))

    def add(self, index: int, delta: TextDelta) -> Iterable[JsonDict]:
        self._answer += delta
        if delta.text or delta.logprobs:
            logprobs = [logprob_json(token) for token in delta.logprobs]
            yield self._part_event("response.output_text.delta", delta=delta.text, logprobs=logprobs)

    def end(self, usage: Usage) -> Iterable[JsonDict]:
        part = self._part(self._answer)
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=0, item=self._item(self._answer))
        whole = self.whole([self._answer], usage)
        yield self._event(f"response.{whole['status']}", response=whole)

    def fail(self, error: ApiError) -> JsonDict:
        fault = error.to_json()["error"]
        # In OpenAI's own event the fields are beside the type, in that of Open Responses below `error`.
        flat = {key: value for key, value in fault.items() if key != "type"}
        return self._event("error", **flat, error=fault)

    def _event(self, kind: str, **content: Any) -> JsonDict:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    def _part_event(self, kind: str, **content: Any) -> JsonDict:
        return self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **content)

    def _item(self, answer: TextDelta) -> JsonDict:
        status = {"stop": "completed", "length": "incomplete", None: "in_progress"}[answer.finish]
        return {
            "type": "message",
            "id": self._item_id,
            "status": status,
            "role": "assistant",
            "content": [self._part(answer)],
        }

    def _part(self, answer: TextDelta) -> JsonDict:
        logprobs = [logprob_json(token) for token in answer.logprobs]
        return {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": logprobs}


def _usage(usage: Usage) -> JsonDict:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
