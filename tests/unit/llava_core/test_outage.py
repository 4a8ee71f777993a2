"""Outages and dead hosts, with real servers that go away and come back."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from collections.abc import Sequence

import pytest
from aiohttp import web

from llava_core.errors import LlavaError
from llava_core.network import outage
from llava_core.network.fetch import USER_AGENT, Fetched, Fetcher
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.x_robots_tag import refuses_use
from llava_core.row_status import Status
from tests.support.servers import answer, serving


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.05)


def limits(patience: float, concurrency: int = 32) -> FetchLimits:
    return FetchLimits(allow_private=True, retries=0, timeout=2, patience=patience, concurrency=concurrency)


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def fetch_in_order(fetcher: Fetcher, urls: Sequence[str]) -> list[Fetched]:
    """As the pipeline does: so many at a time, in the order of the rows."""
    left, results = iter(enumerate(urls)), dict[int, Fetched]()

    async def work() -> None:
        for index, url in left:
            results[index] = await fetcher.fetch(url)

    await asyncio.gather(*(work() for _ in range(32)))
    return [results[index] for index in range(len(urls))]


async def start_server(port: int) -> web.AppRunner:
    async def picture(request: web.Request) -> web.Response:
        await asyncio.sleep(0.01)
        return web.Response(body=b"picture")

    app = web.Application()
    app.router.add_get("/{n}", picture)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    return runner


def test_an_outage_marks_no_row_as_failed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example:80")
    port = closed_port()

    async def run() -> list[Fetched]:
        server = await start_server(port)

        async def go_away_and_come_back() -> None:
            await asyncio.sleep(0.15)
            await server.cleanup()
            await asyncio.sleep(3)
            back.append(await start_server(port))

        back: list[web.AppRunner] = []
        # While a server goes away, connections it holds still get answers and new ones are refused: that is
        # no outage yet, and what the second attempt is for.
        async with Fetcher(dataclasses.replace(limits(patience=30), retries=1)) as fetcher:
            trouble = asyncio.create_task(go_away_and_come_back())
            urls = [f"http://127.0.0.1:{port}/{n}" for n in range(1500)]
            results = await fetch_in_order(fetcher, urls)
            await trouble
        await back[0].cleanup()
        return results

    results = asyncio.run(run())
    # A connection that was cut in the middle of an answer has had one: that is the host's doing.
    assert {result.status for result in results} <= {Status.OK, Status.PROTOCOL, Status.TRUNCATED}
    assert sum(result.status is Status.OK for result in results) > 1400
    said = capfd.readouterr().err
    assert said.count("the network seems down") == 1
    assert said.count("https_proxy is set, but images are asked for without a proxy") == 1
    assert said.count("going on") == 1


def test_a_dead_host_is_left_alone_while_others_answer() -> None:
    port = closed_port()

    async def run(base: str) -> list[Fetched]:
        urls = [f"http://127.0.0.1:{port}/{n}" if n % 3 == 0 else f"{base}/a" for n in range(300)]
        async with Fetcher(limits(patience=30)) as fetcher:
            return await fetch_in_order(fetcher, urls)

    with serving({"/a": answer(b"picture")}) as base:
        results = asyncio.run(run(base))
    dead, living = results[::3], [r for n, r in enumerate(results) if n % 3]
    assert {r.status for r in living} == {Status.OK}
    assert {r.status for r in dead} == {Status.CONNECT}
    assert outage.HOST_FAILURES_TO_OPEN <= sum(r.attempts for r in dead) < len(dead)
    assert dead[-1].detail == "its host answers nobody"


def test_patience_ends() -> None:
    url = f"http://127.0.0.1:{closed_port()}/a"

    async def run(rows: int, patience: float) -> list[Fetched]:
        async with Fetcher(limits(patience)) as fetcher:
            return await fetch_in_order(fetcher, [url] * rows)

    started = time.monotonic()
    with pytest.raises(LlavaError, match=r"the network gave no answer for 0\.4 s.*--patience 0"):
        asyncio.run(run(40, 0.4))
    assert time.monotonic() - started > 0.4
    for rows, patience in ((5, 30.0), (40, 0.0)):  # too few to tell; told to believe
        assert {result.status for result in asyncio.run(run(rows, patience))} == {Status.CONNECT}


@pytest.mark.parametrize(
    ("tags", "refused"),
    [
        ((), False),
        (("noai",), True),
        (("nofollow, NoImageAI",), True),
        (("otherbot: noai",), False),
        (("llava-align: noindex",), True),
        (("unavailable_after: 25 Jun 2030 15:00:00 PST",), False),
        (("all", "*: noimageindex"), True),
        (("unavailable_after: Friday, 25-Jun-30 15:00:00 PST, noai",), True),
        (("NOAI, max-image-preview:large",), True),
        (("max-snippet: 20, max-image-preview:large, nofollow",), False),
        (("otherbot: noai, noindex",), False),
        (("otherbot: noai, LLaVA-align : nofollow, noindex",), True),
    ],
)
def test_x_robots_tag(tags: tuple[str, ...], refused: bool) -> None:
    assert refuses_use(tags, USER_AGENT) is refused


def test_robots_are_honoured_unless_ignored() -> None:
    async def run(url: str, ignore: bool) -> Fetched:
        async with Fetcher(FetchLimits(allow_private=True, ignore_robots=ignore)) as fetcher:
            return await fetcher.fetch(url)

    async def shy(request: web.Request) -> web.Response:
        return web.Response(body=b"picture", headers={"X-Robots-Tag": "noai"})

    with serving({"/a": shy}) as base:
        assert asyncio.run(run(f"{base}/a", False)).status is Status.ROBOTS
        assert asyncio.run(run(f"{base}/a", True)).body == b"picture"
