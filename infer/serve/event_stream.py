"""Server-sent events: the answer of a request while it is generated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

from aiohttp import web

from infer.serve.api_error import ApiError
from infer.serve.intake import DISCONNECTED
from infer.serve.request import TextDelta, Usage
from llava_core.network.async_tasks import time_limit
from llava_core.types import JsonDict

WRITE_SECONDS = 60.0
"""Seconds after which a client that receives nothing of its stream is disconnected."""
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


class Reply(Protocol):
    """The JSON of one endpoint for one request: all at once, or as events."""

    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> JsonDict:
        """The response, of complete answers."""

    def begin(self) -> Iterable[JsonDict]:
        """The first events."""

    def add(self, index: int, delta: TextDelta) -> Iterable[JsonDict]:
        """Events for what answer number `index` has gained."""

    def end(self, usage: Usage) -> Iterable[JsonDict]:
        """Events after all answers have ended."""

    def fail(self, error: ApiError) -> JsonDict:
        """The event of an error."""


def event(content: JsonDict) -> bytes:
    """One server-sent event, in ASCII: readers split lines at U+2028, or guess the encoding of text.

    It has a name if its content has a type, as in the API of responses.
    """
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content)}\n\n".encode()


async def stream(
    request: web.Request,
    reply: Reply,
    deltas: AsyncIterator[tuple[int, TextDelta]],
    usage: Callable[[], Usage],
) -> tuple[web.StreamResponse, int]:
    """Send an answer as events; an error from here on is one of them. The status is for the metrics."""
    status = 200
    response = web.StreamResponse(headers={"Content-Type": EVENTS, "X-Accel-Buffering": "no"})

    async def send(content: bytes) -> None:
        try:
            async with time_limit(WRITE_SECONDS):
                await response.write(content)
        except asyncio.TimeoutError:
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None

    try:
        await response.prepare(request)
        for content in reply.begin():
            await send(event(content))
        try:
            async for index, delta in deltas:
                for content in reply.add(index, delta):
                    await send(event(content))
            for content in reply.end(usage()):
                await send(event(content))
        except ApiError as error:
            status = error.status
            await send(event(reply.fail(error)))
        await send(DONE)
        await response.write_eof()
    except ConnectionError:
        status = DISCONNECTED
    return response, status
