"""`POST /v1/chat/completions`: its parameters, and the JSON of its answers.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Sequence

from infer.serve.answering import AnswerParameters
from infer.serve.api_error import ApiError
from infer.serve.messages import read_messages
from infer.serve.parameters import (
    MAX_TOP_LOGPROBS,
    include_usage,
    is_json_object,
    mapping,
    number_between,
    read_sampling,
    switch,
)
from infer.serve.request import TextDelta, TokenLogprob, Usage
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

MOST_ANSWERS = 128
"""Answers to one request."""


def read_chat(fields: JsonDict, defaults: Sampling, model: str) -> tuple[AnswerParameters, ChatReply]:
    """A request for chat completions. Raises ApiError."""
    messages = read_messages(fields.get("messages"))
    # Both are for a beginning of the answer, in other servers; here its message says it.
    for name, expected in (
        ("continue_final_message", bool(messages.prefill)),
        ("add_generation_prompt", not messages.prefill),
    ):
        if fields.get(name) is not None and switch(fields, name) != expected:
            got = f"{name}: {fields[name]} does not fit the role of the last message"
            raise ApiError(400, got, param=name)
    top = number_between(fields, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    logprobs = switch(fields, "logprobs")
    if top and not logprobs:
        raise ApiError(400, "top_logprobs: expected logprobs with it", param="top_logprobs")
    asked = AnswerParameters(
        messages=messages,
        sampling=read_sampling(fields, defaults),
        stream=switch(fields, "stream"),
        n=number_between(fields, "n", 1, MOST_ANSWERS) or 1,
        json=is_json_object(mapping(fields, "response_format"), "response_format"),
        top_logprobs=(top or 0) if logprobs else None,
    )
    reply = ChatReply(f"chatcmpl-{uuid.uuid4().hex}", model, asked.n, logprobs, include_usage(fields))
    return asked, reply


@dataclasses.dataclass(frozen=True)
class ChatReply:
    """The JSON of one answer, whole or in chunks."""

    ident: str
    model: str
    n: int = 1
    logprobs: bool = False
    include_usage: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> JsonDict:
        choices: list[JsonDict] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []},
                "logprobs": self._logprobs(answer),
                "finish_reason": answer.finish,
            }
            for index, answer in enumerate(answers)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": _usage(usage)}

    def begin(self) -> Iterable[JsonDict]:
        for index in range(self.n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def add(self, index: int, delta: TextDelta) -> Iterable[JsonDict]:
        if delta.text or delta.logprobs:
            yield self._chunk(index, {"content": delta.text}, self._logprobs(delta))
        if delta.finish:
            yield self._chunk(index, {}, finish=delta.finish)

    def end(self, usage: Usage) -> Iterable[JsonDict]:
        if self.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(usage)}

    def fail(self, error: ApiError) -> JsonDict:
        return error.to_json()

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: JsonDict | None = None,
        finish: str | None = None,
    ) -> JsonDict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self.include_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _logprobs(self, delta: TextDelta) -> JsonDict | None:
        if not self.logprobs:
            return None
        return {"content": [logprob_json(token) for token in delta.logprobs], "refusal": None}

    def _head(self, kind: str) -> JsonDict:
        return {"id": self.ident, "object": kind, "created": self.created, "model": self.model}


def logprob_json(token: TokenLogprob) -> JsonDict:
    return {**_one_logprob(token), "top_logprobs": [_one_logprob(other) for other in token.top]}


def _one_logprob(token: TokenLogprob) -> JsonDict:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": None if token.bytes is None else list(token.bytes),
    }


def _usage(usage: Usage) -> JsonDict:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
