"""Limits on the open connections of `infer serve`: their number, and their time without a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Iterator

from aiohttp import web

HEADER_SECONDS = 20.0
"""Seconds within which a connection must send the headers of its first, or next, request."""
WATCH_SECONDS = 1.0
"""Seconds between two checks of that."""
REFUSED = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class Connections:
    """At most `most` connections; beyond, the one idle for longest is closed for the new one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._busy = weakref.WeakSet[asyncio.BaseTransport]()
        """Connections with a request that is being received or answered."""
        self._since = weakref.WeakKeyDictionary[asyncio.BaseTransport, float]()
        """Time (of time.monotonic) since when each of the others has no request."""

    def accept(self, server: web.Server) -> asyncio.Protocol:
        """Protocol of a new connection; it answers 503 if all other connections are busy."""
        if len(server.connections) < self.most:
            return server()
        if not (idle := self._idle(server)):
            return _Full()
        min(idle, key=idle.__getitem__).abort()
        return server()

    @contextlib.contextmanager
    def request(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """Mark a connection as busy, from the end of a request's headers to the end of its answer."""
        if transport is not None:
            self._busy.add(transport)
        try:
            yield
        finally:
            if transport is not None:
                self._busy.discard(transport)
                self._since[transport] = time.monotonic()

    async def watch(self, server: web.Server) -> None:
        """Close connections that send no request within HEADER_SECONDS; never returns."""
        while True:
            for transport, since in self._idle(server).items():
                if time.monotonic() - since > HEADER_SECONDS:
                    transport.abort()
            await asyncio.sleep(WATCH_SECONDS)

    def _idle(self, server: web.Server) -> dict[asyncio.Transport, float]:
        """Connections without a request, and the time since when."""
        transports = [connection.transport for connection in server.connections]
        now = time.monotonic()
        return {t: self._since.setdefault(t, now) for t in transports if t and t not in self._busy}


class _Full(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(REFUSED)
        transport.close()
