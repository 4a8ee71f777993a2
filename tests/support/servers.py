"""A real HTTP server in a thread, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.contextmanager
def serving(routes: dict[str, Handler], host: str = "127.0.0.1") -> Iterator[str]:
    """Serve handlers by path, or by "POST /path"; yields the base URL, without a slash at its end."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def start() -> Any:
        app = web.Application(client_max_size=1 << 26)
        for route, handler in routes.items():
            method, _, path = route.rpartition(" ")
            if method:
                app.router.add_route(method, path, handler)
            else:
                app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, host, 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        ready.set()
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://{host}:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def answer(body: bytes = b"", status: int = 200, kind: str = "application/octet-stream") -> Handler:
    """A handler that always answers the same."""

    async def handle(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type=kind)

    return handle


Speaker = Callable[[asyncio.StreamWriter], Awaitable[None]]


@contextlib.contextmanager
def raw_serving(speakers: Sequence[Speaker]) -> Iterator[list[str]]:
    """A server for each that says what it likes once a request has come; yields their URLs."""
    ready, urls, end = threading.Event(), list[str](), list[Callable[[], object]]()

    def connected(speak: Speaker) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                await reader.readuntil(b"\r\n\r\n")
                await speak(writer)
            writer.close()

        return handle

    async def serve() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        end.append(lambda: loop.call_soon_threadsafe(over.set))
        async with contextlib.AsyncExitStack() as stack:
            for speak in speakers:
                server = await stack.enter_async_context(
                    await asyncio.start_server(connected(speak), "127.0.0.1", 0)
                )
                urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
            ready.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=[serve()], daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield urls
    finally:
        end[0]()
        thread.join(10)
