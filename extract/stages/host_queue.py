"""Queue of rows to download, by host, so that a slow host holds up only its own rows."""

from __future__ import annotations

import asyncio
import collections
from typing import Generic, TypeVar

Item = TypeVar("Item")


class HostQueue(Generic[Item]):
    """A queue that serves the hosts in turn, at most `per_host` items of one host at a time.

    Items of the host None, which needs no network, have no such limit.
    """

    def __init__(self, per_host: int) -> None:
        self.per_host = per_host
        self._waiting: dict[str | None, collections.deque[Item]] = {}
        self._taken: collections.Counter[str | None] = collections.Counter()
        self._turns: collections.OrderedDict[str | None, None] = collections.OrderedDict()
        """Hosts with an item that may be taken now, the next one first."""
        self._startable = asyncio.Semaphore(0)
        self.startable = 0
        """Items that may be taken now."""
        self._fewer = asyncio.Event()

    def put(self, host: str | None, item: Item) -> None:
        self._waiting.setdefault(host, collections.deque()).append(item)
        if len(self._waiting[host]) <= self._spare(host):
            self._allow(host)

    async def get(self) -> tuple[str | None, Item] | None:
        """The next item and its host, to be passed to `done`; None once the queue is closed and
        has none that may be taken now."""
        await self._startable.acquire()
        if not self._turns:
            self._startable.release()  # for the next caller
            return None
        self.startable -= 1
        self._fewer.set()
        host, _ = self._turns.popitem(last=False)
        item = self._waiting[host].popleft()
        self._taken[host] += 1
        if self._waiting[host] and self._spare(host) > 0:
            self._turns[host] = None
        elif not self._waiting[host]:
            del self._waiting[host]
        return host, item

    async def startable_below(self, items: int) -> None:
        """Wait until fewer than `items` may be taken."""
        while self.startable >= items:
            self._fewer.clear()
            await self._fewer.wait()

    def done(self, host: str | None) -> None:
        """Mark one taken item of this host as finished."""
        self._taken[host] -= 1
        if not self._taken[host]:
            del self._taken[host]
        if len(self._waiting.get(host, ())) >= self._spare(host) > 0:
            self._allow(host)

    def close(self) -> None:
        """End the queue: `put` is not called again."""
        self._startable.release()

    def _spare(self, host: str | None) -> int:
        return 1 << 62 if host is None else self.per_host - self._taken[host]

    def _allow(self, host: str | None) -> None:
        self._turns.setdefault(host)
        self.startable += 1
        self._startable.release()
