"""The open connections of `infer serve`: how many there may be, and how long without a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Iterator

from aiohttp import web

HEADER_SECONDS = 20.0
"""Seconds in which a connection must have sent the headers of its first, or next, request."""
WATCH_SECONDS = 1.0
"""Between two looks for those that have not."""
REFUSED = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class Connections:
    """At most `most` connections. Where there are as many, the one longest without a request makes room."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._busy = weakref.WeakSet[asyncio.BaseTransport]()
        """Connections whose request is being read or answered."""
        self._since = weakref.WeakKeyDictionary[asyncio.BaseTransport, float]()
        """When (of time.monotonic) each of the others was first seen without a request."""

    def accept(self, server: web.Server) -> asyncio.Protocol:
        """The protocol of a new connection; one that answers 503 if all others are busy."""
        if len(server.connections) < self.most:
            return server()
        if not (silent := self._silent(server)):
            return _Full()
        min(silent, key=silent.__getitem__).abort()
        return server()

    @contextlib.contextmanager
    def request(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """Around one request, from the end of its headers."""
        if transport is not None:
            self._busy.add(transport)
        try:
            yield
        finally:
            if transport is not None:
                self._busy.discard(transport)
                self._since[transport] = time.monotonic()

    async def watch(self, server: web.Server) -> None:
        """End connections that send no request; never returns."""
        while True:
            for transport, since in self._silent(server).items():
                if time.monotonic() - since > HEADER_SECONDS:
                    transport.abort()
            await asyncio.sleep(WATCH_SECONDS)

    def _silent(self, server: web.Server) -> dict[asyncio.Transport, float]:
        """Connections without a request, and since when."""
        transports = [connection.transport for connection in server.connections]
        now = time.monotonic()
        return {t: self._since.setdefault(t, now) for t in transports if t and t not in self._busy}


class _Full(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(REFUSED)
        transport.close()
