"""OpenAI's interface beyond plain chat: what is built is as specified, what is not is refused by name."""

from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from infer.lens.readout import Vocabulary, embedding_similarity
from infer.serve.lens import TOP
from infer.serve.responses import LOGPROBS
from llava_core.language.load import load_language_model
from llava_core.language.sampling import Sampling
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import build_projector
from llava_core.vision.open import open_vision_tower
from llava_core.vision.similarity import open_both_towers
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT
from tests.support.language_models import TOOLS_TEMPLATE
from tests.support.llava_server import Served, llava_server
from tests.support.paths import WORLD_MODELS

ASK: Any = [{"role": "user", "content": "图中有什么？"}]
TOKENS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"), TOOLS_TEMPLATE)


@pytest.fixture(scope="module")
def served(world: Folders) -> Iterator[Served]:
    """Random models, which read all text and never stop."""
    with llava_server(*world.flags, "--slots", 4, "--max-tokens", TOKENS) as served:
        yield served
        served.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as client:
        yield client


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demo's models, which end their answers, with a projector that was never trained."""
    vision, llm = WORLD_MODELS / "vision", WORLD_MODELS / "llm"
    tower, model = open_vision_tower(vision), load_language_model(llm)
    folder = tmp_path_factory.mktemp("demo") / "run/last"
    torch.manual_seed(0)
    projector = build_projector("linear", tower.width, model.hidden)
    save_checkpoint(folder, projector, Provenance(tower.identity, model.identity), {}, {}, {})
    flags = ("--checkpoint", folder, "--vision", vision, "--llm", llm, "--device", "cpu")
    with llava_server(*flags) as served:
        yield served
        served.stop()


def client_of(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0, timeout=60)


def chat(client: openai.OpenAI, messages: Any = ASK, **fields: Any) -> Any:
    return client.chat.completions.create(model="run/last", messages=messages, **fields)


def said(client: openai.OpenAI, messages: Any = ASK, **fields: Any) -> str:
    return str(chat(client, messages, **fields).choices[0].message.content)


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


@pytest.mark.parametrize(
    ("format_", "refused", "skipped"),
    [
        ("openai-chat", ["chat-tool-calling"], ["chat-reasoning-summary"]),
        ("open-responses", ["tool-calling"], ["reasoning-summary"]),
    ],
)
def test_the_specifications_of_openai_and_of_open_responses(
    demo: Served, format_: str, refused: list[str], skipped: list[str]
) -> None:
    """By llm-comply: schemas, answers, the order of events; calls of tools are refused."""
    command = [sys.executable, "-m", "llm_comply.cli", "--format", format_, "--json", "--api-key", "none"]
    command += ["--base-url", f"{demo.base}/v1", "--model", "run/last"]
    ended = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
    results = json.loads(ended.stdout)["results"]
    by_status: dict[str, list[str]] = {}
    for result in results:
        by_status.setdefault(result["status"], []).append(result["id"])
    assert (by_status["failed"], by_status["skipped"]) == (refused, skipped), ended.stdout.decode()
    assert len(by_status["passed"]) == len(results) - 2 >= 7


def test_an_answer_goes_on_from_its_beginning(client: openai.OpenAI, world: Folders) -> None:
    aligned, begun = world.aligned(), "Es ist "
    prompt = aligned.conversation.prompt(ASK)
    embedded = aligned.embed([*prompt, *aligned.conversation.prefill(begun, prompt)])
    steps = aligned.generate(embedded, Sampling(max_tokens=TOKENS), lambda _: False, [0])
    expected = aligned.text([token for (token,) in steps if token is not None])
    messages = [*ASK, {"role": "assistant", "content": begun}]
    for fields in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        rest = chat(client, messages, extra_body=fields)
        assert rest.choices[0].message.content == expected
        assert rest.usage.prompt_tokens == len(prompt) + len(begun)
    assert said(client, [*ASK, {"role": "assistant", "content": ""}]) == said(client) != expected


def test_what_a_tool_said_is_read(client: openai.OpenAI, demo: Served, world: Folders) -> None:
    function = {"name": "count", "arguments": json.dumps({"what": "<|im_end|>"})}
    call = {"id": "c1", "type": "function", "function": function}
    history = [*ASK, {"role": "assistant", "tool_calls": [call]}]
    tool = {"role": "tool", "tool_call_id": "c1", "content": "三个"}
    called = {"function": {**function, "arguments": {"what": "<|im_end|>"}}}
    told = {"role": "assistant", "content": "", "tool_calls": [called]}
    read = world.aligned().conversation.prompt([*ASK, told, {"role": "tool", "content": "三个"}])
    assert chat(client, [*history, tool]).usage.prompt_tokens == len(read)
    assert said(client, [*history, tool]) != said(client, [*history, {**tool, "content": "两个"}])
    with client_of(demo) as other, pytest.raises(openai.BadRequestError, match="leaves out a tool call"):
        chat(other, [*history, tool])
    with pytest.raises(openai.BadRequestError, match="tool_call_id: expected that of a call"):
        chat(client, [*history, {**tool, "tool_call_id": "c2"}])
    with pytest.raises(openai.BadRequestError, match="the chat template leaves out a system message"):
        chat(client, [*ASK, {"role": "system", "content": "短"}, *ASK])


def test_log_probabilities(client: openai.OpenAI) -> None:
    plain = said(client)
    whole = chat(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = whole.logprobs.content
    assert whole.message.content == plain
    assert len(tokens) == TOKENS
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == plain
    for token in tokens:  # a greedy answer
        first, *others = token.top_logprobs
        assert (token.token, token.logprob) == (first.token, first.logprob)
        assert [first.logprob, *(o.logprob for o in others)] == sorted(
            (o.logprob for o in token.top_logprobs), reverse=True
        )
        assert sum(math.exp(o.logprob) for o in token.top_logprobs) <= 1 + 1e-6
    none = chat(client, logprobs=True).choices[0].logprobs.content
    assert [token.top_logprobs for token in none] == [[]] * TOKENS
    chunks = list(chat(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [t for chunk in chunks if (part := chunk.choices[0].logprobs) for t in part.content]
    assert [token.logprob for token in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    # They are the model's own, whatever the sampling does with them.
    warm = chat(client, logprobs=True, temperature=2, seed=3, max_tokens=1, top_logprobs=1).choices[0]
    assert warm.logprobs.content[0].top_logprobs[0].logprob == pytest.approx(tokens[0].logprob, abs=1e-4)


def test_several_answers(client: openai.OpenAI) -> None:
    four = chat(client, n=4, temperature=1.5, seed=5)
    texts = [choice.message.content for choice in four.choices]
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    assert 0 < four.usage.completion_tokens <= 4 * TOKENS
    assert texts[0] == said(client, temperature=1.5, seed=5)
    streamed = [""] * 4
    ends = []
    for chunk in chat(client, n=4, temperature=1.5, seed=5, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert (streamed, sorted(ends)) == (texts, [0, 1, 2, 3])
    with pytest.raises(openai.BadRequestError, match=r"n: expected up to 68 \(--slots and --queue\), got 69"):
        chat(client, n=69)


def test_a_json_object(client: openai.OpenAI, world: Folders) -> None:
    """From a random model, so that whatever is valid comes: strings, numbers, nested lists."""
    wanted: Any = {"type": "json_object"}
    complete = 0
    for seed in range(6):
        fields = {"temperature": 3, "seed": seed, "max_tokens": 300, "response_format": wanted}
        answer = chat(client, **fields).choices[0]
        if answer.finish_reason == "stop":
            complete += 1
            assert isinstance(json.loads(answer.message.content), dict)
        else:
            assert answer.finish_reason == "length"
            assert answer.message.content.startswith("{")
    assert complete >= 2
    cut = chat(client, max_tokens=1, response_format=wanted).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("length", "{")
    begun = {"role": "assistant", "content": '{"farbe": "rot"'}
    closing = {"temperature": 3, "seed": 1, "max_tokens": 300, "response_format": wanted}
    rest = chat(client, [*ASK, begun], **closing).choices[0]
    if rest.finish_reason == "stop":
        assert json.loads(begun["content"] + rest.message.content)["farbe"]
    with pytest.raises(openai.BadRequestError, match="not the beginning of a JSON object"):
        chat(client, [*ASK, {"role": "assistant", "content": "["}], response_format=wanted)
    with pytest.raises(openai.BadRequestError, match="stop cannot be combined with a JSON object"):
        chat(client, response_format=wanted, stop="a")
    with pytest.raises(openai.BadRequestError, match=r"response_format\.type is not supported here"):
        chat(client, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}}})


def test_responses(client: openai.OpenAI, world: Folders) -> None:
    url = data_url(world.images[0])
    question = ASK[0]["content"]
    image: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    chatted = said(client, [{"role": "user", "content": image}])
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": question}]
    asked: Any = {"model": "run/last", "input": [{"role": "user", "content": parts}]}
    whole = client.responses.create(**asked)
    assert whole.output_text == chatted
    assert (whole.status, whole.store, whole.incomplete_details.reason) == (
        "incomplete", False, "max_output_tokens",
    )  # fmt: skip
    assert whole.usage is not None
    assert whole.usage.output_tokens == TOKENS
    logprobs: Any = {"include": [LOGPROBS], "top_logprobs": 2}
    events = list(client.responses.create(**asked, stream=True, **logprobs))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == chatted
    assert sum(len(event.logprobs) for event in deltas) == TOKENS
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == chatted
    assert said(client, [{"role": "system", "content": "短"}, *ASK]) == (
        client.responses.create(model="run/last", instructions="短", input=question).output_text
    )
    formatted = client.responses.create(
        model="run/last", input=question, max_output_tokens=5, text={"format": {"type": "json_object"}}
    )
    assert formatted.output_text.startswith("{")
    for fields, param in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}}, "text.format.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"instructions": 3}, "instructions"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**{"model": "run/last", "input": "看", **fields})  # type: ignore[call-overload]
        assert refused.value.param == param


def test_embeddings_of_texts_and_images(client: openai.OpenAI, world: Folders) -> None:
    tower = open_both_towers(world.vision, torch.device("cpu"))
    texts = ["红色的圆", "蓝", "a" * 40]
    expected = tower.encode_text(texts)
    found = client.embeddings.create(model="run/last", input=texts)  # as base64, which the client asks for
    assert torch.allclose(torch.tensor([one.embedding for one in found.data]), expected, atol=1e-6)
    assert found.usage.prompt_tokens == sum(map(tower.text_length, texts))
    image: Any = {"type": "image_url", "image_url": {"url": data_url(world.images[0])}}
    mixed = client.embeddings.create(
        model="run/last", input=["蓝", image, "红色的圆"], encoding_format="float", dimensions=16
    )
    pixels = tower.decode(world.images[0].read_bytes()).pixels[None]
    rows = [expected[1:2], tower.encode_image_embedding(pixels), expected[:1]]
    assert torch.allclose(torch.tensor([one.embedding for one in mixed.data]), torch.cat(rows), atol=1e-5)
    assert [one.index for one in mixed.data] == [0, 1, 2]
    for wrong, message in (
        ({"input": "红" * 51}, "expected a text of 1 to 50 tokens"),
        ({"input": [""]}, "expected a text of 1 to 50 tokens"),
        ({"input": "a" * 5001}, "expected a text of 1 to 50 tokens"),  # one unknown word
        ({"input": []}, "expected 1 to 2,048 texts or images"),
        ({"input": [{"type": "image_url", "image_url": "row:a"}]}, "only if the server was started with"),
        ({"input": [[1, 2]]}, "token ids are not supported here"),
        ({"input": "红", "dimensions": 8}, "dimensions: this encoder has 16, got 8"),
        ({"input": "红", "encoding_format": "int8"}, "encoding_format: expected float or base64"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.embeddings.create(**{"model": "run/last", **wrong})  # type: ignore[arg-type]


def test_the_lens_of_an_image(client: openai.OpenAI, world: Folders) -> None:
    aligned = world.aligned()
    visual = aligned.encode_files([world.images[0].read_bytes()])[0]
    words = Vocabulary(aligned).top(embedding_similarity(aligned.llm, visual), 3)[-4:]

    def lens(**fields: Any) -> Any:
        return client.post("/lens", body={"model": "run/last", **fields}, cast_to=object)

    image = {"type": "image_url", "image_url": {"url": data_url(world.images[0])}}
    found = lens(input=image, top=3)
    assert (found["object"], found["side"]) == ("lens", 2)
    assert [[word for word, _ in near] for near in found["words"]] == [[w for w, _ in near] for near in words]
    seen = Image.open(io.BytesIO(base64.b64decode(found["image"].partition(",")[2])))
    assert np.array_equal(np.asarray(seen), aligned.decode(world.images[0].read_bytes()).pixels)
    assert len(lens(input=image)["words"][0]) == TOP
    for wrong, message in (
        ({"input": "红"}, "expected a part of type"),
        ({"input": {"type": "text", "text": "红"}}, "input: expected an image, got text"),
        ({"input": image, "top": 21}, "top: expected 1 to 20, got 21"),
        ({"input": {"type": "image_url", "image_url": "AAAA"}}, "cannot read the image"),
        ({"input": {"type": "image_url", "image_url": "row:a"}}, "only if the server was started with"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            lens(**wrong)
    config = world.checkpoint / "config.json"
    trained = config.read_text(encoding="utf-8")
    config.write_text(json.dumps({"projector": {"kind": "perceiver64x3"}}))  # as if trained in its place
    with pytest.raises(openai.BadRequestError, match="no lens here: the visual tokens of a perceiver"):
        lens(input=image)
    config.write_text(trained)


def test_a_model_is_named_and_is_no_path(client: openai.OpenAI, world: Folders) -> None:
    for path in (str(world.checkpoint), "../run/last", "last", "/run/last"):
        with pytest.raises(openai.NotFoundError, match=r"use 'run/last'") as missing:
            client.chat.completions.create(model=path, messages=ASK)
        assert str(world.checkpoint.parent.parent) not in missing.value.message.replace(path, "")
    for create in (client.chat.completions.create, client.responses.create, client.embeddings.create):
        body: Any = (
            {"model": None, "messages": ASK} if "chat" in str(create) else {"model": None, "input": "a"}
        )
        with pytest.raises(openai.BadRequestError, match="model is missing; use 'run/last'"):
            create(**body)
