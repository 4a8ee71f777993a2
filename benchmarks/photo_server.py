"""JPEGs as large and as slow to decode as photographs, and a server of them in a separate process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

GRAIN = 10
"""Standard deviation of the pictures' noise, for about 0.9 bits a pixel as JPEG: what SA-1B's photos take."""
DRAWN = 8
"""Pictures that are drawn; more differ in a comment, so that none is a duplicate."""


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of soft shapes with grain, which takes the bytes and the decoding time of a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = rng.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def with_comment(jpeg: bytes, number: int) -> bytes:
    """The same picture in a file of its own."""
    comment = f"{number:012d}".encode()
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


@contextlib.contextmanager
def serving(drawn: list[bytes], latency: float) -> Iterator[str]:
    """Serve picture n at /n from a process of its own; yields the base URL."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(drawn, latency, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(drawn: list[bytes], latency: float, pipe: Any) -> None:
    async def picture(request: web.Request) -> web.Response:
        await asyncio.sleep(latency)
        number = int(request.match_info["n"])
        return web.Response(body=with_comment(drawn[number % len(drawn)], number), content_type="image/jpeg")

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/{n}", picture)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
