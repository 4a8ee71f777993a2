"""HTTP server for the built-in world's pictures, with faults of real hosts: dead, cut and slow links."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

TROUBLES = ("/gone/1.jpg", "/gone/2.jpg", "/gone/3.jpg", "/cut.jpg", "/slow.jpg", "/page.html")
"""Paths of three dead links, a truncated picture, one that never ends, and an HTML page."""


@contextlib.contextmanager
def serve(pictures: Path) -> Iterator[str]:
    """Serve the files under `pictures` on a free port of the loopback address; yields the base URL."""
    loop, started = asyncio.new_event_loop(), threading.Event()
    addresses: list[tuple[str, int]] = []

    async def start() -> web.AppRunner:
        runner = web.AppRunner(_app(pictures), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append(runner.addresses[0])
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, name="pictures", daemon=True)
    thread.start()
    started.wait()
    try:
        yield f"http://{addresses[0][0]}:{addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _app(pictures: Path) -> web.Application:
    async def picture(request: web.Request) -> web.FileResponse:
        path = (pictures / request.match_info["path"]).resolve()
        if not path.is_relative_to(pictures.resolve()) or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path)

    async def cut(request: web.Request) -> web.Response:
        whole = next(pictures.rglob("*.jpg")).read_bytes()
        return web.Response(body=whole[: len(whole) // 2], content_type="image/jpeg")

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the client gave up
            while True:  # every read succeeds, so only a deadline over the whole request ends it
                await response.write(b"\xff")
                await asyncio.sleep(0.2)
        return response

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>moved</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/cut.jpg", cut)
    app.router.add_get("/slow.jpg", slow)
    app.router.add_get("/page.html", page)
    app.router.add_get("/{path:.+}", picture)
    return app
