"""Connections that send nothing, or half of a request, keep nobody out; with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from infer.serve import connections
from infer.serve.connections import REFUSED, Connections
from llava_core.errors import LlavaError
from llava_core.network.async_tasks import in_background
from llava_core.network.listen import listening
from tests.support.commands import ENVIRONMENT

HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Door:
    """A server with so many places: /fast answers at once, /slow when `over` is set."""

    def __init__(self, most: int) -> None:
        self.connections, self.over, self.came = Connections(most), asyncio.Event(), asyncio.Semaphore(0)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Door]:
        app = web.Application(middlewares=[self._middleware])
        app.router.add_get("/{how}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        server = runner.server
        assert server is not None
        self.server = server
        loop = asyncio.get_running_loop()
        site = await loop.create_server(lambda: self.connections.accept(server), "127.0.0.1", 0)
        self.port: int = site.sockets[0].getsockname()[1]
        async with in_background(self.connections.watch(server)):
            yield self
        self.over.set()
        site.close()
        await runner.cleanup()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: object) -> web.StreamResponse:
        with self.connections.request(request.transport):
            return await self._answer(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.came.release()
        if request.match_info["how"] == "slow":
            await self.over.wait()
        return web.Response(text="answer")

    async def connect(self, sent: bytes = b"") -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        await writer.drain()
        self.writers = [*getattr(self, "writers", []), writer]
        return reader


async def ended(reader: asyncio.StreamReader) -> bytes:
    """All that came until the other side closed."""
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


async def answered(reader: asyncio.StreamReader) -> bool:
    return (await reader.readuntil(b"answer")).startswith(b"HTTP/1.1 200")


def test_half_sent_headers_make_room() -> None:
    async def run() -> None:
        async with Door(4).open() as door:
            silent = [await door.connect(sent) for sent in (b"", HALF, HALF, HALF)]
            for _ in range(12):  # more of them than there are places
                silent.append(await door.connect(HALF))
                assert await answered(await door.connect(GET % b"fast"))
            for reader in silent[:8]:
                assert await ended(reader) == b""

    asyncio.run(run())


def test_a_burst_of_connections_is_bounded_too() -> None:
    """All of them come before the server has seen one."""

    async def run() -> None:
        async with Door(4).open() as door:
            burst = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(60)]
            assert await answered(await door.connect(GET % b"fast"))
            assert len(door.server.connections) <= 4
            for one in burst:
                one.close()

    asyncio.run(run())


def test_requests_that_are_answered_are_never_ended_for_others() -> None:
    async def run() -> None:
        async with Door(3).open() as door:
            slow = []
            for _ in range(3):
                slow.append(await door.connect(GET % b"slow"))
                await door.came.acquire()
            assert await ended(await door.connect(GET % b"fast")) == REFUSED
            door.over.set()
            assert [await answered(reader) for reader in slow] == [True] * 3
            assert await answered(await door.connect(GET % b"fast"))

    asyncio.run(run())


def test_headers_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte at a time as well, and between two requests; not while an answer is awaited."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(connections, "WATCH_SECONDS", 0.02)

    async def run() -> None:
        async with Door(100).open() as door:
            slow = await door.connect(GET % b"slow")
            kept = await door.connect(GET % b"fast")
            assert await answered(kept)
            silent = [await door.connect(), await door.connect(HALF)]
            dripping = await door.connect(HALF)
            drip = door.writers[-1]

            async def go_on() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        drip.write(b"x")
                        await drip.drain()
                        await asyncio.sleep(0.02)

            async with in_background(go_on()):
                for reader in (*silent, dripping, kept):
                    assert await ended(reader) == b""
            door.over.set()
            assert await answered(slow)

    asyncio.run(run())


def test_two_servers_that_start_together_do_not_both_get_the_port() -> None:
    """Neither takes connections yet: their models are still to be loaded."""
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(LlavaError, match=f"port {port} of 127.0.0.1 is in use; choose another --port"):
            listening("127.0.0.1", port)
        early = socket.create_connection(("127.0.0.1", port))
        early.close()
    with listening("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_a_decoder_that_never_ends_does_not_keep_the_process() -> None:
    script = """
import asyncio, threading, types
from infer.serve.image_cache import VisualTokenCache

async def main():
    begun = threading.Event()
    decode = lambda image: (begun.set(), threading.Event().wait())
    pictures = VisualTokenCache(types.SimpleNamespace(aligned=types.SimpleNamespace(decode=decode)))
    waiting = asyncio.create_task(pictures.get(b"image"))
    await asyncio.to_thread(begun.wait)
    waiting.cancel()

asyncio.run(main())
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"ended\n", b"")
