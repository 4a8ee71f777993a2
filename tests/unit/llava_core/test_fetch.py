"""Every way a download can end, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from llava_core.network import fetch
from llava_core.network.fetch import Fetched, Fetcher, fetch_all, fetch_each
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.retry import LONGEST_PAUSE, LONGEST_RETRY_AFTER, pause_seconds, retry_after_seconds
from llava_core.row_status import Status
from tests.support.servers import answer, serving

HERE = FetchLimits(allow_private=True, timeout=5, retries=0, max_bytes=100_000)
asked: list[str] = []


async def drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(2000):
        await response.write(b"x")
        await asyncio.sleep(0.01)
    return response


async def silent(request: web.Request) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(50_000))


async def cut(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(bytes(100))
    assert request.transport is not None
    request.transport.close()
    return response


async def later(request: web.Request) -> web.Response:
    asked.append(request.path)
    if len(asked) < 3:
        return web.Response(status=503, headers={"Retry-After": "0"})
    return web.Response(body=b"at last")


async def counted(request: web.Request) -> web.Response:
    asked.append(request.path)
    return web.Response(status=404)


async def headers(request: web.Request) -> web.Response:
    return web.json_response(dict(request.headers), headers={"Set-Cookie": "a=b"})


def redirect(to: str) -> web.HTTPFound:
    return web.HTTPFound(to)


async def round_and_round(request: web.Request) -> web.Response:
    raise web.HTTPFound("/round")


async def to_metadata(request: web.Request) -> web.Response:
    raise web.HTTPFound("http://169.254.169.254/latest/meta-data")


async def to_file(request: web.Request) -> web.Response:
    raise web.HTTPFound("file:///etc/passwd")


async def to_picture(request: web.Request) -> web.Response:
    raise web.HTTPFound("/ok")


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    routes = {
        "/ok": answer(b"picture"),
        "/gone": answer(status=410),
        "/broken": answer(status=500),
        "/empty": answer(status=204),
        "/large": answer(bytes(100_001)),
        "/drip": drip,
        "/silent": silent,
        "/endless": endless,
        "/cut": cut,
        "/later": later,
        "/counted": counted,
        "/headers": headers,
        "/round": round_and_round,
        "/to-metadata": to_metadata,
        "/to-file": to_file,
        "/to-picture": to_picture,
    }
    with serving(routes) as url:
        yield url


def got(url: str, **limits: float) -> Fetched:
    (fetched,) = fetch_all([url], FetchLimits(**{**vars(HERE), **limits}))
    return fetched


def test_a_body_arrives(base: str) -> None:
    assert got(f"{base}/ok") == Fetched(Status.OK, b"picture", 200, 1)
    assert got(f" {base}/to-picture ").body == b"picture"


@pytest.mark.parametrize(
    ("path", "status", "http"),
    [
        ("/gone", Status.HTTP_4XX, 410),
        ("/broken", Status.HTTP_5XX, 500),
        ("/empty", Status.PROTOCOL, 204),
        ("/large", Status.TOO_LARGE, 200),
        ("/endless", Status.TOO_LARGE, 200),
        ("/cut", Status.TRUNCATED, 0),
        ("/round", Status.TOO_MANY_REDIRECTS, 0),
        ("/to-metadata", Status.FORBIDDEN_ADDRESS, 0),
        ("/to-file", Status.BAD_URL, 0),
    ],
)
def test_every_failure_has_its_name(base: str, path: str, status: Status, http: int) -> None:
    fetched = got(base + path)
    assert (fetched.status, fetched.http, fetched.body) == (status, http, b"")


def test_a_silent_server_ends_at_the_deadline(base: str) -> None:
    assert got(f"{base}/silent", timeout=0.3).status is Status.TIMEOUT


def test_a_drip_ends_below_the_least_rate(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SLOW_AFTER", 0.2)
    assert got(f"{base}/drip").status is Status.TOO_SLOW


@pytest.mark.parametrize(
    "url", ["", "picture.jpg", "ftp://example.org/a.jpg", "http://", "http://[::1/x", "data:,x"]
)
def test_addresses_that_are_none(url: str) -> None:
    fetched = got(url)
    assert (fetched.status, fetched.attempts) == (Status.BAD_URL, 0)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"]
)
def test_private_addresses_are_closed_unless_opened(base: str, host: str) -> None:
    port = base.rsplit(":", 1)[1]
    fetched = got(f"http://{host}:{port}/ok", allow_private=False)
    # Some spellings aiohttp itself takes for no address at all.
    assert fetched.status in (Status.FORBIDDEN_ADDRESS, Status.BAD_URL)
    assert (fetched.status is Status.BAD_URL) <= host.isdigit()


def test_nobody_listens() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert got(f"http://127.0.0.1:{port}/").status is Status.CONNECT


def test_a_name_that_does_not_resolve() -> None:
    assert got("http://no-such-host.invalid/a.jpg").status is Status.DNS


def test_no_certificate(base: str) -> None:
    assert got(base.replace("http", "https") + "/ok").status is Status.TLS


def test_what_may_pass_is_tried_again(base: str) -> None:
    asked.clear()
    fetched = got(f"{base}/later", retries=2)
    assert (fetched.status, fetched.attempts, fetched.body) == (Status.OK, 3, b"at last")


def test_what_is_final_is_not(base: str) -> None:
    asked.clear()
    assert got(f"{base}/counted", retries=2).attempts == 1
    assert asked == ["/counted"]


def test_the_request_is_honest_and_plain(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    body = got(f"{base}/headers").body.decode()
    assert "llava-align/" in body
    assert '"Accept-Encoding": "identity"' in body
    assert "Cookie" not in body


def test_requests_at_a_time_are_bounded_per_host() -> None:
    now = most = 0

    async def count(request: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.Response(body=b"x")

    async def many(url: str) -> list[Fetched]:
        async with Fetcher(FetchLimits(allow_private=True, concurrency=50, per_host=3)) as fetcher:
            return await asyncio.gather(*(fetcher.fetch(url) for _ in range(30)))

    with serving({"/": count}) as url:
        assert all(f.status is Status.OK for f in asyncio.run(many(url)))
    assert most == 3


def test_waiting_for_a_slot_does_not_count_as_time(base: str) -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(0.5)
        return web.Response(body=b"x")

    async def many(url: str) -> list[Fetched]:
        limits = FetchLimits(allow_private=True, per_host=1, timeout=2.0, retries=0)
        async with Fetcher(limits) as fetcher:
            return await asyncio.gather(*(fetcher.fetch(url) for _ in range(5)))

    started = time.monotonic()
    with serving({"/": slow}) as url:
        assert all(f.status is Status.OK for f in asyncio.run(many(url)))
    assert time.monotonic() - started > 2.4


def test_secrets_in_an_address_stay_out_of_the_detail(base: str) -> None:
    for path in ("/gone", "/cut", "/round", "/to-metadata", "/large"):
        assert "hunter2" not in got(f"{base}{path}?token=hunter2").detail


def test_a_host_that_asks_for_peace_gets_it() -> None:
    """Retry-After, as seconds or as a date, holds for every request to that host."""
    times: list[float] = []

    async def busy(request: web.Request) -> web.Response:
        times.append(time.monotonic())
        if len(times) > 1:
            return web.Response(body=b"picture")
        return web.Response(status=429, headers={"Retry-After": "1"})

    async def run(base: str) -> list[Fetched]:
        async with Fetcher(dataclasses.replace(HERE, retries=1, per_host=1)) as fetcher:
            return await asyncio.gather(*(fetcher.fetch(f"{base}/busy?{i}") for i in range(3)))

    with serving({"/busy": busy}) as base:
        assert [f.status for f in asyncio.run(run(base))] == [Status.OK] * 3
    assert len(times) == 4
    assert times[1] - times[0] >= 1


def test_retry_after_in_its_two_forms() -> None:
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < (retry_after_seconds(in_a_minute) or 0) <= 60
    assert retry_after_seconds("2.5") == 2.5
    assert retry_after_seconds("1e9") == LONGEST_RETRY_AFTER
    assert [retry_after_seconds(header) for header in (None, "", "soon", "-3")] == [None, None, None, 0]


@pytest.mark.parametrize("huge", ["9" * 20, "9" * 400, "-" + "9" * 20])
def test_a_retry_after_with_numbers_beyond_all_bounds_is_none(huge: str) -> None:
    date = "Wed, 21 Oct 2099 07:28:00 +0100"
    for part in ("21", "2099", "07", "28:00", "+0100"):
        assert retry_after_seconds(date.replace(part, huge)) is None


def test_pauses_grow_to_the_longest() -> None:
    assert 0.5 <= pause_seconds(1) <= 1
    assert all(0.5 * LONGEST_PAUSE < pause_seconds(attempt) <= LONGEST_PAUSE for attempt in (6, 12, 1100))


def test_no_download_begins_while_too_many_bytes_wait() -> None:
    served: list[str] = []

    async def picture(request: web.Request) -> web.Response:
        served.append(request.path)
        return web.Response(body=bytes(60_000))

    async def run(base: str) -> None:
        limits = dataclasses.replace(HERE, bytes_in_flight=100_000, concurrency=1)
        async with Fetcher(limits) as fetcher:
            waiting = [await fetcher.fetch(f"{base}/{i}") for i in range(2)]
            third = asyncio.create_task(fetcher.fetch(f"{base}/2"))
            await asyncio.sleep(0.2)
            assert len(served) == 2
            fetcher.release(waiting.pop())
            assert (await third).status is Status.OK
            assert fetcher.received == 180_000

    with serving({"/{n}": picture}) as base:
        asyncio.run(run(base))


def test_what_was_taken_makes_room_for_the_next(base: str) -> None:
    taken: list[int] = []
    limits = dataclasses.replace(HERE, bytes_in_flight=1, concurrency=1)
    urls = [f"{base}/ok"] * 5

    def take(index: int, fetched: Fetched) -> None:
        assert fetched.body == b"picture"
        taken.append(index)

    thread = threading.Thread(target=fetch_each, args=(urls, limits, take), daemon=True)
    thread.start()
    thread.join(20)
    assert sorted(taken) == [*range(5)]


def test_a_connection_that_is_not_made_in_time_is_told_from_a_slow_answer() -> None:
    async def run(url: str, limits: FetchLimits) -> Fetched:
        async with Fetcher(limits) as fetcher:
            return await fetcher.fetch(url)

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):  # nobody accepts: once its queue is full, no further connection is made
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        found = asyncio.run(run(url, dataclasses.replace(HERE, connect_timeout=0.3, timeout=60)))
    assert (found.status, found.detail) == (Status.TIMEOUT, "no connection in time")
    with serving({"/silent": silent}) as base:
        found = asyncio.run(run(f"{base}/silent", dataclasses.replace(HERE, connect_timeout=60, timeout=0.3)))
    assert (found.status, found.detail) == (Status.TIMEOUT, "not done within 0.3 s")
