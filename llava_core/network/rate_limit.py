"""Per-host rate limit, and a budget for bytes in flight."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator


class HostRateLimit:
    """Limits requests to one host: `at_a_time` together, `per_second`, and none during a `pause`."""

    def __init__(self, at_a_time: int, per_second: float | None) -> None:
        self._at_a_time = asyncio.Semaphore(at_a_time)
        self._interval = 1 / per_second if per_second else 0.0
        self._free = 0.0
        """When (of time.monotonic) the next request may begin."""

    @contextlib.asynccontextmanager
    async def turn(self, slots: asyncio.Semaphore, memory: ByteBudget) -> AsyncIterator[None]:
        """Context of one request; it takes one of `slots` and begins while there is room in `memory`."""
        async with self._at_a_time:
            while True:  # the host may have asked for a pause while we waited for the others
                while (wait := self._free - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                async with slots:
                    await memory.room()
                    if self._free <= time.monotonic():
                        self._free = time.monotonic() + self._interval
                        yield
                        return

    def pause(self, seconds: float) -> None:
        """Begin no request for this many seconds, as Retry-After asks."""
        self._free = max(self._free, time.monotonic() + seconds)


class ByteBudget:
    """Limit on the bytes held in memory at a time.

    Wait for `room` before taking any. What began while there was room may exceed the limit.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit, self.held = limit, 0
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> None:
        """Wait until fewer bytes than the limit are held."""
        await self._room.wait()

    def hold(self, n: int) -> None:
        self.held += n
        if self.held >= self.limit:
            self._room.clear()

    def release(self, n: int) -> None:
        self.held -= n
        if self.held < self.limit:
            self._room.set()
