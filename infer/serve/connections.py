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
        return _Arriving(self, server)

    def make_room(self, server: web.Server) -> bool:
        """Close the connection that is idle for longest, if there are `most`; False if none is idle."""
        idle = self._idle(server)
        if len(idle) + len(self._busy) < self.most:
            return True
        if idle:
            min(idle, key=idle.__getitem__).abort()
        return bool(idle)

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
        """Open connections without a request, and the time since when."""
        transports = [connection.transport for connection in server.connections]
        idle = [t for t in transports if t and t not in self._busy and not t.is_closing()]
        now = time.monotonic()
        return {t: self._since.setdefault(t, now) for t in idle}


class _Arriving(asyncio.Protocol):
    """A connection that is not counted yet: many of a burst are accepted before the first one is open."""

    def __init__(self, connections: Connections, server: web.Server) -> None:
        self._connections, self._server = connections, server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._connections.make_room(self._server):
            protocol = self._server()
            transport.set_protocol(protocol)
            protocol.connection_made(transport)
        else:
            transport.write(REFUSED)
            transport.close()
