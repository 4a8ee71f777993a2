"""Rows that wait for a download, by host, so that a slow host keeps only its own rows waiting."""

from __future__ import annotations

import asyncio
import collections
from typing import Generic, TypeVar

Item = TypeVar("Item")


class HostQueues(Generic[Item]):
    """A queue whose `get` takes the hosts in turn, and from none more than `per_host` at a time.

    Items of the host None, which needs no network, are taken without limit.
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

    def put(self, host: str | None, item: Item) -> None:
        self._waiting.setdefault(host, collections.deque()).append(item)
        if len(self._waiting[host]) <= self._spare(host):
            self._allow(host)

    async def get(self) -> tuple[str | None, Item] | None:
        """The next item and its host, for whom `done` is to be called; None once there will be no more."""
        await self._startable.acquire()
        if not self._turns:
            self._startable.release()  # for the next one who asks
            return None
        self.startable -= 1
        host, _ = self._turns.popitem(last=False)
        item = self._waiting[host].popleft()
        self._taken[host] += 1
        if self._waiting[host] and self._spare(host) > 0:
            self._turns[host] = None
        elif not self._waiting[host]:
            del self._waiting[host]
        return host, item

    def done(self, host: str | None) -> None:
        """What was taken has had its answer."""
        self._taken[host] -= 1
        if not self._taken[host]:
            del self._taken[host]
        if len(self._waiting.get(host, ())) >= self._spare(host) > 0:
            self._allow(host)

    def close(self) -> None:
        """Nothing more will be put."""
        self._startable.release()

    def _spare(self, host: str | None) -> int:
        return 1 << 62 if host is None else self.per_host - self._taken[host]

    def _allow(self, host: str | None) -> None:
        self._turns.setdefault(host)
        self.startable += 1
        self._startable.release()
