"""What all requests share: their number, their places, the arrival of bodies and of image files."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from infer.serve.api_error import ApiError
from infer.serve.config import ServeConfig
from infer.serve.messages import read_image_text
from infer.serve.prometheus import Metrics
from infer.serve.request import STOPPING
from infer.serve.stored_rows import SCHEME
from llava_core.data_url import is_data_url
from llava_core.errors import first_line
from llava_core.network.async_tasks import time_limit
from llava_core.network.fetch import Fetcher
from llava_core.row_status import Status

BODY_SECONDS = 60.0
"""Seconds within which a request's body must arrive."""
DISCONNECTED = 499
"""Status in the metrics of a request whose client disconnected."""


class Intake:
    """Limits on requests, each from the first byte of its body to the last of its answer."""

    def __init__(self, config: ServeConfig, fetcher: Fetcher, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.inside = 0
        """Number of requests."""
        self.stopping = False
        """Whether new requests are refused, as the server ends."""
        self.empty = asyncio.Event()
        """Set while no place is taken."""
        self.empty.set()
        self._fetcher = fetcher
        self._placed = 0
        """Number of answers of requests whose body and image have arrived, and that are not complete."""
        self._receiving = 0
        """Bytes received of bodies that are not complete."""

    async def handle(
        self,
        respond: Callable[[web.Request], Awaitable[tuple[web.StreamResponse, int]]],
        request: web.Request,
    ) -> web.StreamResponse:
        """Count a request; `respond` gives the status to count, too: a stream may fail after a 200."""
        status = DISCONNECTED
        self.inside += 1
        try:
            self._require_places(1)
            response, status = await respond(request)
            return response
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            self.inside -= 1
            self.metrics.requests.labels(status).inc()

    @property
    def places(self) -> int:
        return self.config.slots + self.config.queue

    def _require_places(self, count: int) -> None:
        if self.stopping:
            raise ApiError(503, STOPPING.error, code="stopping")
        if self._placed + count > self.places:
            message = f"{self._placed} requests are here already; try again soon"
            raise ApiError(429, message, code="queue_full")

    @contextlib.contextmanager
    def place(self, count: int = 1) -> Iterator[None]:
        """Places for so many more answers; a client that still sends its body holds none."""
        if count > self.places:  # which no later try would find
            raise ApiError(
                400, f"n: expected up to {self.places} (--slots and --queue), got {count}", param="n"
            )
        self._require_places(count)
        self._placed += count
        self.empty.clear()
        try:
            yield
        finally:
            self._placed -= count
            if not self._placed:
                self.empty.set()

    async def body(self, request: web.Request) -> bytes:
        """The body of a request. Raises ApiError for one that is too large, too slow or damaged."""
        limit = self.config.max_bytes * 4 // 3 + (1 << 20)
        too_large = ApiError(413, f"a request may have {limit:,} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        try:
            async with time_limit(BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    body += chunk
                    self._receiving += len(chunk)
                    if len(body) > limit:
                        raise too_large
                    if self._receiving > limit * self.places:
                        raise ApiError(
                            429, "too many bodies are coming in; try again soon", code="queue_full"
                        )
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise ApiError(400, f"the body is damaged: {first_line(error)}") from None
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body took over {BODY_SECONDS:g} s") from None
        finally:
            self._receiving -= len(body)
        if (coding := request.headers.get("Content-Encoding", "identity").lower()) == "identity":
            return bytes(body)
        if coding not in ("gzip", "deflate"):
            raise ApiError(415, f"Content-Encoding: expected gzip or deflate, got {coding[:80]!r}")
        # Not by aiohttp, which unpacks what it drops, too: 4 MB, or the first part of it, can hold 4 GB.
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
        try:
            unpacked = unpacker.decompress(body, limit + 1)
        except zlib.error as error:
            raise ApiError(400, f"the body is damaged: {first_line(error)}") from None
        if len(unpacked) > limit:
            raise too_large
        if not unpacker.eof:
            raise ApiError(400, f"the body is damaged: {coding} data that end early")
        return unpacked

    async def image_file(self, url: str) -> bytes:
        """Content of an image file. Raises ApiError if it cannot be fetched."""
        if url.startswith(SCHEME):
            message = "stored rows are for answers, and only if the server was started with --features"
            raise ApiError(400, message, param="messages", code="invalid_image_url")
        if is_data_url(url) or ":" not in url:
            return read_image_text(url, self.config.max_bytes)
        if self.config.allow_remote_images:
            fetched = await self._fetcher.fetch(url)
            self._fetcher.release(fetched)
            if fetched.status is not Status.OK:
                message = f"cannot fetch the image: {fetched.status.label} ({fetched.detail})"
                raise ApiError(400, message, param="messages", code="invalid_image_url")
            return fetched.body
        message = "this server fetches no images; send a data URL, or start it with --allow-remote-images"
        raise ApiError(400, message, param="messages", code="invalid_image_url")
