from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest

from infer.serve.openai_api import ApiError, ChatRequest, Shapes, Usage, event, parse_request, read_image_text
from llava_core.language.sampling import Sampling

USER = {"role": "user", "content": "看"}
PNG = "data:image/png;base64,iVBORw0KGgo="


def parse(body: bytes | None = None, **fields: Any) -> ChatRequest:
    content = json.dumps({"messages": [USER], **fields}).encode() if body is None else body
    return parse_request(content, "run/last", Sampling(max_tokens=9, seed=5))


def image(url: str = PNG) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_bare_request() -> None:
    assert parse() == ChatRequest([USER], None, Sampling(max_tokens=9, seed=5), False, False)


def test_every_field() -> None:
    asked = parse(
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
        n=1,
        user="me",
        metadata={"deeply": ["ignored"]},
        frequency_penalty=0.0,
        response_format={"type": "text"},
        tools=[],
        logit_bias=None,
    )  # fmt: skip
    assert asked.messages == [
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "一\n二"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "三"},
    ]
    assert asked.image == PNG
    assert (asked.stream, asked.include_usage) == (True, True)
    assert asked.sampling == Sampling(
        max_tokens=4, temperature=1, top_p=0.5, top_k=7, repetition_penalty=1.5, seed=-2, stop=("。", "\n")
    )
    assert not parse(stream=None, stream_options={"include_usage": None}, n=None).stream
    assert parse(stop="x", temperature=None, stream_options=None).sampling.stop == ("x",)
    assert (
        parse(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": PNG}]}]).image == PNG
    )


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"stream": "true"}, 400, "stream"),
        ({"stream": 1}, 400, "stream"),
        ({"stream_options": True}, 400, "stream_options"),
        ({"stream_options": []}, 400, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, 400, "stream_options.include_usage"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": ["hello"]}, 400, "messages[0]"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "messages[1].role"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, 400, "messages"),
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
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logprobs": True}, 400, "logprobs"),
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
    assert (asked.messages[0]["content"], asked.image) == ("一\n二", PNG)
    assert parse(messages=[{"role": "user", "content": [{"type": "image", "image": PNG}]}]).image == PNG


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


def test_shapes() -> None:
    shapes = Shapes("chatcmpl-1", "m", include_usage=True, created=7)
    head = {"id": "chatcmpl-1", "created": 7, "model": "m"}
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 2,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    message = {"role": "assistant", "content": "好", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert shapes.whole("好", "stop", Usage(5, 2, 4)) == {
        **head, "object": "chat.completion", "choices": [choice], "usage": usage,
    }  # fmt: skip
    chunk = {**head, "object": "chat.completion.chunk"}
    delta = {"index": 0, "delta": {"content": "好"}, "logprobs": None, "finish_reason": None}
    assert shapes.chunk({"content": "好"}) == {**chunk, "choices": [delta], "usage": None}
    assert "usage" not in Shapes("i", "m").chunk({})
    assert shapes.usage_chunk(Usage(5, 2, 4)) == {**chunk, "choices": [], "usage": usage}
    sent = event({"a": "好\n\u2028"})
    assert sent == b'data: {"a": "\\u597d\\n\\u2028"}\n\n'
