from __future__ import annotations

import base64
import json
from typing import Any, get_type_hints
from urllib.parse import quote

import pytest
from openai.types import EmbeddingCreateParams
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming

from infer.serve.answering import AnswerParameters
from infer.serve.api_error import ApiError
from infer.serve.chat_completions import ChatReply, read_chat
from infer.serve.event_stream import event
from infer.serve.messages import Messages, read_image_text
from infer.serve.parameters import CHAT, EMBEDDINGS, RESPONSES, Support, read_body
from infer.serve.request import TextDelta, TokenLogprob, Usage
from llava_core.language.sampling import Sampling

USER = {"role": "user", "content": "看"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "左"}'}}
PNG = "data:image/png;base64,iVBORw0KGgo="


def read(body: bytes | None = None, **fields: Any) -> tuple[AnswerParameters, ChatReply]:
    content = json.dumps({"model": "run/last", "messages": [USER], **fields}).encode()
    given = read_body(content if body is None else body, CHAT, "run/last")
    return read_chat(given, Sampling(max_tokens=9, seed=5), "run/last")


def parse(body: bytes | None = None, **fields: Any) -> AnswerParameters:
    return read(body, **fields)[0]


def image(url: str = PNG) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_bare_request() -> None:
    assert parse() == AnswerParameters(Messages([USER]), Sampling(max_tokens=9, seed=5))
    assert not read()[1].include_usage


def test_every_field() -> None:
    asked, reply = read(
        model="run/last",
        messages=[
            {"role": "developer", "content": "简短。"},
            {"role": "user", "content": [image(), text("一"), text("二")]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": [text("三"), image()]},
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=3,
        max_completion_tokens=4,
        temperature=1,
        top_p=0.5,
        top_k=7,
        repetition_penalty=1.5,
        seed=-2,
        stop=["。", "\n"],
        n=3,
        logprobs=True,
        top_logprobs=2,
        user="me",
        metadata={"deeply": ["ignored"]},
        frequency_penalty=0.0,
        response_format={"type": "text"},
        tools=[],
        logit_bias=None,
    )  # fmt: skip
    assert asked.messages.turns == [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "一\n二"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "三"},
    ]
    assert asked.messages.image == PNG
    assert (asked.stream, reply.include_usage, reply.logprobs) == (True, True, True)
    assert (asked.n, asked.top_logprobs, asked.json) == (3, 2, False)
    assert asked.sampling == Sampling(
        max_tokens=4, temperature=1, top_p=0.5, top_k=7, repetition_penalty=1.5, seed=-2, stop=("。", "\n")
    )
    assert not parse(stream=None, stream_options={"include_usage": None}, n=None).stream
    assert parse(stop="x", temperature=None, stream_options=None).sampling.stop == ("x",)
    alone = [{"role": "user", "content": [{"type": "image_url", "image_url": PNG}]}]
    assert parse(messages=alone).messages.image == PNG
    assert parse(response_format={"type": "json_object"}).json
    assert (parse(logprobs=True).top_logprobs, parse(logprobs=False).top_logprobs) == (0, None)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"model": "/models/run/last"}, 404, "model"),
        ({"model": ["run/last"]}, 404, "model"),
        ({"n": 0}, 400, "n"),
        ({"n": 129}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"stream": "true"}, 400, "stream"),
        ({"stream": 1}, 400, "stream"),
        ({"stream_options": True}, 400, "stream_options"),
        ({"stream_options": []}, 400, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, 400, "stream_options.include_usage"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": ["hello"]}, 400, "messages[0]"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, 400, "messages[1].role"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "messages[1].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, 400, "messages"),
        ({"messages": [{**USER, "name": "x"}]}, 400, "messages[0].name"),
        ({"messages": [{**USER, "contents": "x"}]}, 400, "messages[0].contents"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, 400, "messages[0].tool_calls"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, 400, "messages"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, 400, "messages[1].tool_calls[0]"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
         400, "messages[1].tool_calls[0].function.arguments"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"add_generation_prompt": False}, 400, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "messages[0].content[0].text"),
        ({"messages": [{"role": "system", "content": [image()]}, USER]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [image(), image(PNG + "A")]}]}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"temperature": float("inf")}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": -0.1}, 400, "top_p"),
        ({"top_k": -2}, 400, "top_k"),
        ({"max_tokens": -2}, 400, "max_tokens"),
        ({"max_tokens": float("inf")}, 400, "max_tokens"),
        ({"max_tokens": "64"}, 400, "max_tokens"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"stop": [None]}, 400, "stop"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"response_format": "json"}, 400, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format.type"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "tool_choice"),
        ({"audio": {"voice": "x", "format": "wav"}}, 400, "audio"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"reasoning_effort": "low"}, 400, "reasoning_effort"),
        ({"verbosity": "low"}, 400, "verbosity"),
        ({"service_tier": "priority"}, 400, "service_tier"),
        ({"store": True}, 400, "store"),
        ({"logprobs": 1}, 400, "logprobs"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": True}}, 400, "stream_options.include_obfuscation"),
        ({"repeat_penalty": 1.1}, 400, "repeat_penalty"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"stop": {"a": 1}}, 400, "stop"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields: dict[str, Any], status: int, param: str) -> None:
    with pytest.raises(ApiError) as raised:
        parse(**fields)
    assert (raised.value.status, raised.value.param) == (status, param)
    assert raised.value.to_json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"top_k": -1}, {"top_k": -1}),
        ({"max_tokens": -1}, {"max_tokens": -1}),
        ({"max_tokens": 64.0, "seed": 7.0, "n": 1.0}, {"max_tokens": 64, "seed": 7}),
        ({"max_tokens": 64, "max_completion_tokens": None}, {"max_tokens": 64}),
        ({"top_p": 0}, {"top_p": 0}),
        ({"stop": ""}, {}),
        ({"stop": []}, {}),
        ({"stop": ["", "。"]}, {"stop": ("。",)}),
        (dict.fromkeys(("stop", "n", "seed", "temperature", "top_p", "tools", "unknown")), {}),
        ({"seed": -1}, {}),  # as without one
    ],
)  # fmt: skip
def test_values_mean_what_they_mean_elsewhere(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    assert parse(**fields).sampling == Sampling(**{"max_tokens": 9, "seed": 5, **changed})


def test_an_unknown_field_is_named_with_the_nearest_one() -> None:
    with pytest.raises(
        ApiError, match=r"unknown field 'repeat_penalty'; did you mean 'repetition_penalty'\?"
    ):
        parse(repeat_penalty=1.1)


def test_content_parts_of_other_clients() -> None:
    parts = [{"type": "input_image", "image_url": PNG}, {"type": "input_text", "text": "一"}, "二"]
    asked = parse(messages=[{"role": "user", "content": parts}])
    assert asked.messages == Messages([{"role": "user", "content": "一\n二"}], PNG)
    alone = [{"role": "user", "content": [{"type": "image", "image": PNG}]}]
    assert parse(messages=alone).messages.image == PNG


def test_the_beginning_of_an_answer_and_what_a_tool_said() -> None:
    begun = parse(messages=[USER, {"role": "assistant", "content": "红", "prefix": True}]).messages
    assert begun == Messages([USER], prefill="红")
    call = {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": []}
    told = {"role": "tool", "tool_call_id": "c1", "name": "look", "content": [text("三个")]}
    turns = parse(messages=[USER, call, told]).messages.turns
    function = {"name": "look", "arguments": {"at": "左"}}
    assert turns[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c1", "function": function}],
        },
        {"role": "tool", "content": "三个", "tool_call_id": "c1", "name": "look"},
    ]


@pytest.mark.parametrize(
    ("table", "parameters"),
    [
        (CHAT, CompletionCreateParamsStreaming),
        (RESPONSES, ResponseCreateParamsStreaming),
        (EMBEDDINGS, EmbeddingCreateParams),
    ],
)
def test_every_parameter_of_openai_has_its_place(table: dict[str, Support], parameters: type) -> None:
    assert set(get_type_hints(parameters)) <= table.keys()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"a":"' + b"\xff" + b'"}', b"[" * 100_000])
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is no JSON") as raised:
        parse(body)
    assert raised.value.status == 400


def test_images_as_text() -> None:
    data = bytes(range(256)) * 4
    plain = base64.b64encode(data).decode()
    safe, lines = base64.urlsafe_b64encode(data).decode(), base64.encodebytes(data).decode()
    for text in (
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;charset=utf-8;BASE64,{plain.rstrip('=')}",
        f"data:;base64,{lines}",
        f"data:image/png; base64,\r\n{safe}",
        f"data:image/png;base64,{quote(plain)}",
        f"data:image/png,{quote(data)}",
        plain,
        lines,
        safe.rstrip("="),
    ):
        assert read_image_text(text, len(data)) == data
    for wrong, status in [
        (plain, 413),
        ("data:image/png;base64", 400),
        ("data:image/png;base64,?", 400),
        ("data:image/png;base64,图", 400),
        ("data:image/png;base64,%ff", 400),
        ("data:image/png;base64,A", 400),
        ("图.png", 400),
    ]:
        with pytest.raises(ApiError) as raised:
            read_image_text(wrong, 900)
        assert raised.value.status == status


def test_errors_by_status() -> None:
    kinds = {status: ApiError(status, "x").to_json()["error"]["type"] for status in (401, 403, 413, 429, 500)}
    assert list(kinds.values()) == [
        "authentication_error",
        "permission_error",
        "invalid_request_error",
        "rate_limit_error",
        "server_error",
    ]


def test_the_json_of_an_answer() -> None:
    reply = ChatReply("chatcmpl-1", "m", include_usage=True, created=7)
    head = {"id": "chatcmpl-1", "created": 7, "model": "m"}
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    message: dict[str, Any] = {"role": "assistant", "content": "好", "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert reply.whole([TextDelta("好", "stop")], Usage(5, 2, 4)) == {
        **head, "object": "chat.completion", "choices": [choice], "usage": usage,
    }  # fmt: skip
    chunk = {**head, "object": "chat.completion.chunk"}
    delta = {"index": 0, "delta": {"content": "好"}, "logprobs": None, "finish_reason": None}
    assert [*reply.add(0, TextDelta("好"))] == [{**chunk, "choices": [delta], "usage": None}]
    last = {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert [*ChatReply("chatcmpl-1", "m", 2, created=7).add(1, TextDelta("", "length"))] == [
        {**chunk, "choices": [last]}
    ]
    assert [*reply.end(Usage(5, 2, 4))] == [{**chunk, "choices": [], "usage": usage}]
    assert [*ChatReply("i", "m").end(Usage(5, 2, 4))] == []
    sent = event({"a": "好\n\u2028"})
    assert sent == b'data: {"a": "\\u597d\\n\\u2028"}\n\n'
    assert event({"type": "a.b"}) == b'event: a.b\ndata: {"type": "a.b"}\n\n'


def test_log_probabilities_of_half_a_character() -> None:
    half = TokenLogprob("\ufffd", b"\xe5", -0.5, (TokenLogprob("\ufffd", None, -1.5),))
    (chunk,) = ChatReply("i", "m", logprobs=True).add(0, TextDelta("", logprobs=(half,)))
    (token,) = chunk["choices"][0]["logprobs"]["content"]
    assert token == {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xE5],
        "top_logprobs": [{"token": "\ufffd", "logprob": -1.5, "bytes": None}],
    }
