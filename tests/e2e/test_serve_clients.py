"""`infer serve` under the clients that people have, and with the values that they send."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
import openai
import pytest
import requests

from infer.chat.image_dialogue import ImageDialogue
from llava_core.language.sampling import Sampling
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT, run
from tests.support.llava_server import Served, llava_server
from tests.support.paths import ROOT

TOKENS = 24
CONTEXT = 128
TEXT = "图中有什么？"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def served(world: Folders) -> Iterator[Served]:
    with llava_server(*world.flags, "--slots", 2, "--max-tokens", TOKENS, "--context", CONTEXT) as served:
        yield served


@pytest.fixture(scope="module")
def answer(world: Folders) -> str:
    """What `infer ask` answers to TEXT about the first image."""
    dialogue = ImageDialogue(world.aligned(), Sampling(max_tokens=TOKENS))
    dialogue.show(str(world.images[0]))
    return "".join(dialogue.ask(TEXT))


def body_of(image: Path | str | None, **fields: Any) -> dict[str, Any]:
    if isinstance(image, Path):
        image = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": TEXT}]}]
    return {"model": "run/last", "messages": messages, **fields}


def post(served: Served, body: dict[str, Any]) -> Any:
    return requests.post(f"{served.base}/v1/chat/completions", json=body, timeout=60).json()


def said(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def by_requests(url: str, body: dict[str, Any]) -> list[str]:
    with requests.post(url, json=body, stream=True, timeout=60) as response:
        return [str(line) for line in response.iter_lines(decode_unicode=True)]


def by_httpx(url: str, body: dict[str, Any]) -> list[str]:
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        return list(response.iter_lines())  # splits at U+2028, U+2029 and U+0085, too


def by_aiohttp(url: str, body: dict[str, Any]) -> list[str]:
    async def lines() -> list[str]:
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            return (await response.text()).splitlines()

    return asyncio.run(lines())


@pytest.mark.parametrize("lines_of", [by_requests, by_httpx, by_aiohttp])
def test_a_stream_is_read_by_clients_that_guess_the_encoding_and_split_lines(
    served: Served, world: Folders, answer: str, lines_of: Callable[[str, dict[str, Any]], list[str]]
) -> None:
    assert not answer.isascii()
    lines = lines_of(f"{served.base}/v1/chat/completions", body_of(world.images[0], stream=True))
    events = [line.removeprefix("data: ") for line in lines if line]
    assert all(line.startswith("data: ") and line.isascii() for line in lines if line)
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == answer


def test_an_answer_in_one_piece_is_utf_8_that_says_so(served: Served, world: Folders, answer: str) -> None:
    response = requests.post(f"{served.base}/v1/chat/completions", json=body_of(world.images[0]), timeout=60)
    assert response.headers["Content-Type"] == "application/json; charset=utf-8"
    assert said(json.loads(response.text)) == answer
    assert not response.text.isascii()  # legible in a terminal


def test_an_image_may_be_written_in_any_way_that_clients_write_it(
    served: Served, world: Folders, answer: str
) -> None:
    data = world.images[0].read_bytes()
    data += bytes((1 - len(data)) % 3)  # so that base64 is padded; a PNG may have more behind its end
    plain = base64.b64encode(data).decode()
    safe, lines = base64.urlsafe_b64encode(data).decode(), base64.encodebytes(data).decode()
    assert plain.endswith("=")
    for image in (
        f"DATA:image/png;name=a.png;BASE64,{lines}",
        f"data:image/png;base64,{safe.rstrip('=')}",
        f"data:image/png;base64,{quote(plain)}",
        f"data:image/png,{quote(data)}",
        plain,
        f" data:image/png;base64,{plain}\n",
    ):
        assert said(post(served, body_of(image))) == answer
    for part in ({"type": "input_image", "image_url": plain}, {"type": "image_url", "image_url": plain}):
        content = [part, {"type": "input_text", "text": TEXT}]
        messages = [{"role": "user", "content": content}]
        assert said(post(served, {"model": "run/last", "messages": messages})) == answer
    error = post(served, body_of("bild.png"))["error"]
    assert "cannot read the image 'bild.png'" in error["message"]
    assert (error["param"], error["code"]) == ("messages", "invalid_image_url")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("", "image_url: expected a data URL or an address, got ''"),
        (" \n", "image_url: expected a data URL or an address, got ' \\n'"),
        ("data:image/jpeg;base64,", "cannot read the image: not an image (no bytes)"),
        (None, "image_url: expected a data URL or an address, got None"),
    ],
)
def test_an_image_that_is_empty_is_no_question_without_one(
    served: Served, image: str | None, message: str
) -> None:
    """What clients send whose own reading of the file failed."""
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": TEXT}]
    body = {"model": "run/last", "messages": [{"role": "user", "content": parts}]}
    assert post(served, body)["error"]["message"] == message


def test_values_mean_what_they_mean_elsewhere(served: Served, world: Folders, answer: str) -> None:
    client = openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0, timeout=60)
    body = body_of(world.images[0])
    neutral = {"temperature": 0, "n": 1, "stop": "", "seed": None, "presence_penalty": 0, "tools": []}
    for fields in (
        neutral,
        {"temperature": 1.5, "top_p": 0, "top_k": -1},
        {"max_tokens": float(TOKENS), "stop": []},
        {
            "skip_special_tokens": True,
            "ignore_eos": False,
            "best_of": 1,
            "min_tokens": 0,
            "stop_token_ids": [],
        },
        {"temperature": None, "stop": None, "max_completion_tokens": TOKENS},
    ):
        assert said(post(served, {**body, **fields})) == answer
    most = client.chat.completions.create(**body, max_tokens=-1)
    assert most.usage is not None
    assert most.usage.total_tokens == CONTEXT
    assert (most.choices[0].finish_reason, most.choices[0].message.content) != ("stop", answer)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"stream": "true"}, "stream: expected true or false, got 'true'"),
        ({"max_tokens": 1.5}, "max_tokens: expected a whole number, got 1.5"),
        ({"max_tokens": -2}, "max_tokens; expected a number above 0, or -1; got -2"),
        ({"frequency_penalty": 1}, "frequency_penalty is not supported here, got 1; leave it out"),
        ({"repeat_penalty": 1}, "unknown field 'repeat_penalty'; did you mean 'repetition_penalty'?"),
    ]
    for wrong, message in refused:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**body, extra_body=wrong)
        (name,) = wrong
        assert message in raised.value.message
        assert raised.value.param == name


def test_flags_take_the_same_values(world: Folders, answer: str) -> None:
    flags = ("--temperature", 2, "--top-p", 0, "--top-k", -1, "--stop", "", "--max-tokens", TOKENS)
    asked = run("infer", "ask", *world.flags, "--image", world.images[0], "--prompt", TEXT, *flags, "--json")
    assert asked.summary["answer"] == answer.strip()
    most = run("infer", "ask", *world.flags, "--image", world.images[0], "--max-tokens", -1, "--json")
    assert most.summary["tokens"] > 256


CLIENTS = ROOT / "build/clients"
"""Clients that the pinned versions leave out (docs/develop/contributing.md): litellm takes 230 MB, and it and
LangChain ask for other versions of what they share."""
ASKED = {
    "litellm": """
import litellm
call = dict(model="openai/run/last", messages=messages, api_base=base, api_key="none", num_retries=0)
whole = litellm.completion(**call).choices[0].message.content
streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**call, stream=True)]
try:
    tools = [{"type": "function", "function": {"name": "f"}}]
    litellm.completion(**call, tools=tools, tool_choice="required")
except litellm.BadRequestError as error:
    refused = str(error)
del call["messages"]
embedded = litellm.embedding(**call, input=["a"]).data[0]["embedding"]
""",
    "langchain_openai": """
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
model = dict(model="run/last", base_url=base, api_key="none", max_retries=0)
chat = ChatOpenAI(**model)
whole = chat.invoke(messages).content
streamed = [chunk.content for chunk in chat.stream(messages)]
try:
    chat.bind_tools([{"name": "f", "description": "", "parameters": {}}], tool_choice="required").invoke("a")
except Exception as error:
    refused = str(error)
embedded = OpenAIEmbeddings(**model, check_embedding_ctx_length=False).embed_query("a")
""",
    "node": """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: base, apiKey: "none", maxRetries: 0 }), model = "run/last";
(async () => {
  const whole = (await client.chat.completions.create({ model, messages })).choices[0].message.content;
  const streamed = [];
  for await (const chunk of await client.chat.completions.create({ model, messages, stream: true }))
    streamed.push(chunk.choices[0].delta.content || "");
  const tools = [{ type: "function", function: { name: "f" } }];
  const refused = await client.chat.completions
    .create({ model, messages, tools, tool_choice: "required" }).catch((error) => error.message);
  const embedded = (await client.embeddings.create({ model, input: "a" })).data[0].embedding;
  console.log(JSON.stringify({ whole, streamed, refused, embedded }));
})();
""",
}
"""Programs of other clients; `base` and `messages` are given."""


@pytest.mark.parametrize("client", ASKED)
def test_other_clients(client: str, served: Served, world: Folders, answer: str) -> None:
    package = "node_modules/openai" if client == "node" else client
    if not (CLIENTS / package).exists() or (client == "node" and shutil.which("node") is None):
        pytest.skip(f"no {package} in build/clients, or no node")
    given = {"base": f"{served.base}/v1", "messages": body_of(world.images[0])["messages"]}
    if client == "node":
        lines = [f"const {name} = {json.dumps(value)};" for name, value in given.items()]
        command = ["node", "-e", "\n".join(lines) + ASKED[client]]
    else:
        names = "dict(whole=whole, streamed=streamed, refused=refused, embedded=embedded)"
        lines = [f"{name} = {value!r}" for name, value in given.items()]
        code = "\n".join(lines) + ASKED[client] + f"import json; print(json.dumps({names}))"
        command = [sys.executable, "-c", code]
    alone = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }  # no call of any other host
    paths = {"PYTHONPATH": str(CLIENTS), "NODE_PATH": str(CLIENTS / "node_modules")}
    ended = subprocess.run(command, capture_output=True, env={**ENVIRONMENT, **paths, **alone}, timeout=120)
    assert ended.returncode == 0, ended.stderr.decode()
    found = json.loads(ended.stdout.decode().splitlines()[-1])
    assert (found["whole"], "".join(found["streamed"])) == (answer, answer)
    assert "not supported here" in found["refused"]
    assert len(found["embedded"]) == 16
