"""`infer serve` as its clients meet it: the openai package, the llm command, plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from infer.chat.image_dialogue import ImageDialogue
from llava_core.language.instructions import QUESTION
from llava_core.language.sampling import Sampling
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT, run
from tests.support.llava_server import Served, llava_server
from tests.support.servers import answer, serving

TOKENS = 24
ENDLESS = {"max_tokens": 10_000, "messages": [{"role": "user", "content": "说"}]}
"""A random model goes on until the context is full: 1000 tokens, some seconds."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def served(world: Folders) -> Iterator[Served]:
    """With four slots, and the defaults otherwise."""
    with llava_server(*world.flags, "--slots", 4, "--max-tokens", TOKENS, "--json") as served:
        yield served
        summary = json.loads(served.stop(signal.SIGHUP).splitlines()[-1])
        assert summary["requests"] >= summary["answered"] > 0
        assert summary["completion_tokens"] > 0


@pytest.fixture(scope="module")
def strict(world: Folders) -> Iterator[Served]:
    """One slot, one place in the queue, small images, a key, addresses of images, a site that may ask."""
    flags = ("--slots", 1, "--queue", 1, "--max-bytes", 5000, "--api-key", "geheim", "--model-id", "mine")
    remote = ("--allow-remote-images", "--allow-private", "--allow-origin", "https://a.example")
    # The compiled step, without torch's compiler, which takes a minute.
    with llava_server(*world.flags, *flags, *remote, "--compile", TORCHDYNAMO_DISABLE="1") as served:
        assert any("compiling the step" in line for line in served.log)
        yield served


@pytest.fixture(scope="module")
def session(world: Folders) -> ImageDialogue:
    return ImageDialogue(world.aligned(), Sampling(max_tokens=TOKENS))


def client_of(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key=key, max_retries=0, timeout=60)


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def question(text: str, url: str | None = None) -> Any:
    image = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return {"role": "user", "content": [*image, {"type": "text", "text": text}]}


def asked(session: ImageDialogue, text: str, image: Path | None = None) -> str:
    """What `infer ask` says."""
    session.begin()
    if image:
        session.show(str(image))
    return "".join(session.ask(text))


def http_request(served: Served, path: str, body: Any = None, **headers: str) -> tuple[int, str, Any]:
    """Status, body and headers, whatever the status."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(served.base + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def gauge(served: Served, name: str, key: str = "") -> float:
    text = http_request(served, "/metrics", authorization=f"Bearer {key}")[1]
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_openai_client(served: Served, world: Folders, session: ImageDialogue) -> None:
    client = client_of(served)
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("run/last").id == "run/last"

    messages = [question("图中有什么？", data_url(world.images[0]))]
    whole = client.chat.completions.create(model=model.id, messages=messages)
    assert whole.choices[0].message.content == asked(session, "图中有什么？", world.images[0])
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == session.figures.prefilled
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", TOKENS)

    stream = client.chat.completions.create(
        model=model.id, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert {chunk.id for chunk in chunks} == {last.id}
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert last.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1

    text = asked(session, "你好")
    again = client.chat.completions.create(
        model=model.id, messages=[question("你好")], stop=[text[4:6]], max_completion_tokens=20
    )
    assert again.choices[0].message.content == text[: text.index(text[4:6])]
    assert again.choices[0].finish_reason == "stop"

    def warm(seed: int) -> str | None:
        return client.chat.completions.create(
            model=model.id, messages=[question("你好")], seed=seed, temperature=1.5, top_p=0.9,
            extra_body={"top_k": 40, "repetition_penalty": 1.2},
        ).choices[0].message.content  # fmt: skip

    assert warm(1) == warm(1) != warm(2)


def test_errors_reach_the_openai_client_as_its_own(served: Served, world: Folders, tmp_path: Path) -> None:
    client = client_of(served)

    def refused(messages: Any, model: str = "run/last") -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as raised:
            client.chat.completions.create(model=model, messages=messages)
        return raised.value

    no_model = refused([question("看")], model="gpt-4o")
    assert isinstance(no_model, openai.NotFoundError)
    assert no_model.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("run/best")

    remote = refused([question("看", "http://127.0.0.1:1/a.png")])
    assert (remote.status_code, remote.code) == (400, "invalid_image_url")
    assert "--allow-remote-images" in remote.message
    text = tmp_path / "text.png"
    text.write_text("不是图片")
    assert "cannot read the image: not an image" in refused([question("看", data_url(text))]).message
    two = [question("看", data_url(world.images[0])), question("看", data_url(world.images[1]))]
    assert "one image in each conversation" in refused(two).message
    long = refused([question("长" * 400)])
    assert (long.code, long.status_code) == ("context_length_exceeded", 400)
    assert "the context is 1,024 tokens, the messages have 1,2" in long.message
    assert "the messages have 20,000 characters" in refused([question("长" * 20_000)]).message


def test_the_llm_command(served: Served, world: Folders, session: ImageDialogue, tmp_path: Path) -> None:
    settings = {"model_id": "mine", "model_name": "run/last", "api_base": f"{served.base}/v1", "vision": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([settings]))
    alone = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": "", "OPENAI_API_KEY": "none"}
    environment = {**ENVIRONMENT, **alone}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", "-m", "mine", *arguments]
        ended = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, timeout=120)
        assert ended.returncode == 0, ended.stderr.decode()
        return ended.stdout.decode(errors="replace").strip()

    image = world.images[3]
    assert llm("看", "-a", str(image)) == asked(session, "看", image).strip()
    # The next turn of the dialogue sends picture and history again.
    second = llm("-c", "再看")
    session.clear()
    assert "".join(session.ask("看"))
    assert second == "".join(session.ask("再看")).strip()


def test_many_clients_at_once(served: Served, world: Folders, session: ImageDialogue) -> None:
    """More than slots, some streaming; nobody is lost, and everybody hears what they would hear alone."""
    cases = [(f"第{n}个问题", world.images[n % 5] if n % 3 else None) for n in range(16)]

    def ask(case: tuple[str, Path | None]) -> str:
        text, image = case
        messages = [question(text, data_url(image) if image else None)]
        client = client_of(served)
        if len(text) % 2:
            stream = client.chat.completions.create(model="run/last", messages=messages, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(model="run/last", messages=messages)
        return whole.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, cases * 2))
    assert answers == [asked(session, *case) for case in cases] * 2
    assert gauge(served, "llava_slots_busy") == gauge(served, "llava_requests_inside") == 0
    assert gauge(served, 'llava_requests_total{status="200"}') >= 32
    families = text_string_to_metric_families(
        http_request(served, "/metrics")[1]
    )  # by Prometheus' own parser
    kinds = {family.name: family.type for family in families}
    assert kinds["llava_requests"] == kinds["llava_cached_tokens"] == "counter"
    assert kinds["llava_first_token_seconds"] == kinds["llava_request_seconds"] == "histogram"
    assert kinds["process_resident_memory_bytes"] == "gauge"


def test_another_question_about_a_picture_under_discussion_reads_only_the_question(
    served: Served, tmp_path: Path, session: ImageDialogue
) -> None:
    client, pictures = client_of(served), [tmp_path / "discussed.png", tmp_path / "another.png"]
    for picture, colour in zip(pictures, ("teal", "tan"), strict=True):
        Image.new("RGB", (40, 30), colour).save(picture)
    first = [question("说", data_url(pictures[0]))]
    with client.chat.completions.create(
        model="run/last", messages=first, stream=True, max_tokens=10_000
    ) as running:
        next(iter(running))
        for picture, text in zip(pictures, ("图中有什么？", "颜色"), strict=True):
            messages = [question(text, data_url(picture))]
            reply = client.chat.completions.create(model="run/last", messages=messages)
            assert reply.choices[0].message.content == asked(session, text, picture)
            assert reply.usage is not None
            assert reply.usage.prompt_tokens_details is not None
            cached = reply.usage.prompt_tokens_details.cached_tokens
            assert bool(cached) == (picture is pictures[0])


def test_another_sites_page_gets_nothing(served: Served) -> None:
    ask = {"model": "run/last", "messages": [{"role": "user", "content": "说"}]}
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        status, body, got = http_request(served, "/v1/chat/completions", ask, **headers)
        assert status == 403
        assert json.loads(body)["error"]["type"] == "permission_error"
        assert "Access-Control-Allow-Origin" not in got
    assert http_request(served, "/v1/chat/completions", ask, Origin=served.base)[0] == 200
    page = http_request(served, "/")
    assert "default-src 'none'" in page[2]["Content-Security-Policy"]
    assert page[2]["X-Content-Type-Options"] == "nosniff"
    status, body, _ = http_request(served, "/nowhere")
    assert (status, json.loads(body)["error"]["message"]) == (404, "GET /nowhere: Not Found")
    assert http_request(served, "/v1/chat/completions")[0] == 405
    health = {"status": "ok", "model": "run/last", "question": QUESTION}
    assert json.loads(http_request(served, "/health")[1]) == health


def test_the_key_and_the_site_that_may_ask(strict: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(strict, "falsch").models.list()
    assert [model.id for model in client_of(strict, "geheim").models.list()] == ["mine"]
    assert http_request(strict, "/metrics")[0] == 401
    assert http_request(strict, "/health")[0] == http_request(strict, "/page.js")[0] == 200
    connection = http.client.HTTPConnection(strict.base.removeprefix("http://"))
    connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://a.example"})
    preflight = connection.getresponse()
    assert (preflight.status, preflight.headers["Access-Control-Allow-Origin"]) == (204, "https://a.example")
    connection.close()


def test_images_by_address(strict: Served, world: Folders) -> None:
    client = client_of(strict, "geheim")
    image = world.images[1].read_bytes()
    assert len(image) < 5000
    with serving({"/a.png": answer(image), "/large": answer(bytes(6000))}) as base:
        by_address, by_data, gone, large = (
            http_request(strict, "/v1/chat/completions",
                         {"model": "mine", "messages": [question("看", url)], "max_tokens": 9},
                         authorization="Bearer geheim")
            for url in (f"{base}/a.png", data_url(world.images[1]), f"{base}/b.png", f"{base}/large")
        )  # fmt: skip
    message = [json.loads(one[1])["choices"][0]["message"] for one in (by_address, by_data)]
    assert message[0] == message[1]
    assert "cannot fetch the image: http 4xx (HTTP 404)" in gone[1]
    assert "too large" in large[1]
    for url in ("http://169.254.169.254/latest/meta-data", "file:///etc/passwd"):
        with pytest.raises(openai.BadRequestError, match="cannot fetch the image") as raised:
            client.chat.completions.create(model="mine", messages=[question("看", url)])
        assert "root:" not in raised.value.message


def test_bodies_images_and_the_queue_are_bounded(strict: Served) -> None:
    client = client_of(strict, "geheim")
    key = {"authorization": "Bearer geheim"}
    large = question("看", "data:image/png;base64," + "A" * 9000)
    with pytest.raises(openai.APIStatusError, match="an image may have 5,000 bytes") as raised:
        client.chat.completions.create(model="mine", messages=[large])
    assert raised.value.status_code == 413
    status, body, _ = http_request(strict, "/v1/chat/completions", b"x" * 2_000_000, **key)
    assert (status, json.loads(body)["error"]["message"]) == (413, "a request may have 1,055,242 bytes")

    with client.chat.completions.create(model="mine", stream=True, **ENDLESS) as running:  # type: ignore[call-overload]
        next(iter(running))
        with client.chat.completions.create(model="mine", stream=True, **ENDLESS) as waiting:  # type: ignore[call-overload]
            wait_for(lambda: gauge(strict, "llava_requests_waiting", "geheim") == 1)
            with pytest.raises(openai.RateLimitError, match="2 requests are here") as refused:
                client.chat.completions.create(model="mine", messages=[question("看")])
            assert refused.value.response.headers["retry-after"] == "1"
            running.close()
            # Who leaves makes room for who waits.
            wait_for(lambda: gauge(strict, "llava_requests_waiting", "geheim") == 0)
            assert gauge(strict, "llava_slots_busy", "geheim") == 1
            waiting.close()
    half = socket.create_connection(("127.0.0.1", int(strict.base.rsplit(":", 1)[1])))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer geheim\r\n"
    half.sendall(f"{head}Content-Length: 900\r\n\r\n{{".encode())
    wait_for(lambda: gauge(strict, "llava_requests_inside", "geheim") == 1)
    half.close()
    wait_for(lambda: gauge(strict, "llava_requests_inside", "geheim") == 0)
    wait_for(lambda: gauge(strict, "llava_slots_busy", "geheim") == 0)
    assert gauge(strict, 'llava_requests_total{status="499"}', "geheim") == 3
    assert client.chat.completions.create(model="mine", messages=[question("看")], max_tokens=2).choices


def test_slow_bodies_keep_nobody_out(strict: Served) -> None:
    """More of them than slots and queue have places."""
    client = client_of(strict, "geheim")
    address = ("127.0.0.1", int(strict.base.rsplit(":", 1)[1]))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer geheim\r\n"
    slow = [socket.create_connection(address) for _ in range(6)]
    for half in slow:
        half.sendall(f"{head}Content-Length: 900\r\n\r\n{{".encode())
    wait_for(lambda: gauge(strict, "llava_requests_inside", "geheim") == 6)
    assert client.chat.completions.create(model="mine", messages=[question("看")], max_tokens=2).choices
    for half in slow:
        half.close()
    wait_for(lambda: gauge(strict, "llava_requests_inside", "geheim") == 0)


def test_a_body_may_be_compressed_and_what_is_dropped_is_not_unpacked(strict: Served) -> None:
    asked = {"model": "mine", "messages": [question("看")], "max_tokens": 2}
    packed, key = gzip.compress(json.dumps(asked).encode()), {"authorization": "Bearer geheim"}
    for coding, body, code, told in (
        ("gzip", packed, 200, ""),
        ("deflate", zlib.compress(json.dumps(asked).encode()), 200, ""),
        ("gzip", gzip.compress(bytes(50_000_000)), 413, "a request may have 1,055,242 bytes"),
        ("gzip", packed[:-9], 400, "the body is damaged: gzip data that end early"),
        ("gzip", b"abcd", 400, "the body is damaged: Error -3"),
        ("br", b"abcd", 415, "Content-Encoding: expected gzip or deflate, got 'br'"),
    ):
        headers = {**key, "Content-Encoding": coding}
        status, answered, _ = http_request(strict, "/v1/chat/completions", body, **headers)
        assert (status, told in answered) == (code, True), (coding, answered)
    with socket.create_connection(("127.0.0.1", int(strict.base.rsplit(":", 1)[1]))) as one:
        dropped = b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"
        one.sendall(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\n" + dropped)
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        statuses = re.findall(rb"HTTP/1.1 (\d+)", b"".join(iter(lambda: one.recv(65536), b"")))
    assert statuses == [b"401", b"200"]  # no damaged data were met


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),  # TLS
    b"GET / HTTP/9.9\r\n\r\n",
    b"G\xff\xfeT / HTTP/1.1\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\x1b[31m\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1, 2\r\n\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: 4\r\n\r\nabcd",
    b"POST /health HTTP/1.1\r\nHost: localhost\r\nExpect: magic\r\nContent-Length: 0\r\n\r\n",
    *(
        b"%s HTTP/1.1\r\nHost: localhost\r\n%s" % (to, body)
        for to in (b"GET /health", b"POST /health", b"POST /nowhere", b"POST /v1/chat/completions")
        for body in (
            b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
            b"Content-Encoding: deflate\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}zz\r\n",
            b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff\r\n{}",
            b"Content-Length: 99\r\n\r\n{",
        )
    ),
    b"GET //[ HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET http://[::1/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT a:b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\xff\xff",
]


def test_malformed_http_leaves_no_traceback(served: Served) -> None:
    address = ("127.0.0.1", int(served.base.rsplit(":", 1)[1]))
    for sent in MALFORMED:
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(65536):
                    pass
    assert json.loads(http_request(served, "/health")[1])["status"] == "ok"
    log = "".join(served.log)
    assert "Traceback" not in log
    assert "Unhandled" not in log


def test_a_port_in_use_is_one_line(served: Served, world: Folders) -> None:
    port = served.base.rsplit(":", 1)[1]
    line = run("infer", "serve", *world.flags, "--port", port, code=1).one_line()
    assert line == f"error: port {port} of 127.0.0.1 is in use; choose another --port"


def test_a_second_signal_ends_streams_with_an_error(strict: Served) -> None:
    """The last test of this server."""
    client = client_of(strict, "geheim")
    with client.chat.completions.create(model="mine", stream=True, n=2, **ENDLESS) as running:  # type: ignore[call-overload]
        next(iter(running))
        strict.process.send_signal(signal.SIGTERM)
        wait_for(lambda: http_request(strict, "/health")[0] == 503)
        strict.stop(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(running)
    assert any("finishing the answers under way, for up to 30 s" in line for line in strict.log)


def test_stopping_finishes_answers_and_refuses_new_ones(world: Folders) -> None:
    with llava_server(*world.flags, "--slots", 1, "--queue", 1) as served:
        client = client_of(served)
        with client.chat.completions.create(model="run/last", stream=True, n=2, **ENDLESS) as running:  # type: ignore[call-overload]
            next(iter(running))
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: http_request(served, "/health")[0] == 503)
            with pytest.raises(openai.InternalServerError, match="the server is stopping") as refused:
                client.chat.completions.create(model="run/last", messages=[question("看")])
            assert (refused.value.status_code, refused.value.code) == (503, "stopping")
            ends = [chunk.choices[0].finish_reason for chunk in running]
        assert (ends.count("length"), ends.count("stop")) == (2, 0)
        served.ended()


def test_answers_that_take_longer_than_the_limit_are_ended(world: Folders) -> None:
    with llava_server(*world.flags, "--slots", 1, "--drain", 0) as served:
        stream = client_of(served).chat.completions.create(model="run/last", stream=True, n=9, **ENDLESS)  # type: ignore[call-overload]
        with stream as running:
            next(iter(running))
            served.stop()
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(running)
