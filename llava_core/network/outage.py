"""Telling a dead host from a dead line, so that an outage marks no row as failed.

A download without an answer is blamed on its host only once an attempt that began after its failure got one
(for a host that has never answered: one that began after it did). If none does, STREAK downloads in a row,
the network is taken to be down: everything pauses, one download at a time tries again, and all go on once one
gets an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Hashable

from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.network.async_tasks import time_limit
from llava_core.row_status import Status

SILENT = (Status.DNS, Status.CONNECT, Status.TIMEOUT)
"""Outcomes of an attempt that nobody answered."""
UNSENT = (Status.BAD_URL, Status.FORBIDDEN_ADDRESS)
"""Outcomes of an attempt that asked nobody."""
STREAK = 20
"""Downloads without an answer, and none with one between them, that make an outage."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds between two looks at a network that is down; they double."""
TRIPS = 16
"""Attempts in a row without an answer after which a host is left alone while others answer."""
COOL_DOWN = 60.0
"""Seconds for which it is left alone; then one attempt looks again."""


@dataclasses.dataclass
class _Host:
    silent: int = 0
    """Attempts in a row without an answer."""
    status: Status = Status.CONNECT
    """How the last of them ended."""
    since: float = 0.0
    """When the first of them ended."""
    known: bool = False
    """It has answered before."""
    closed_until: float = 0.0


class Health:
    """What the downloads of one event loop have found out about the network and its hosts.

    The network may be down for `patience` seconds before LlavaError is raised; 0 believes every failure.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._proof = 0.0
        """When the latest attempt began that got an answer, whatever it was."""
        self._back = 0.0
        """When the latest outage ended: what had begun before may have failed for it."""
        self._hosts: dict[Hashable, _Host] = defaultdict(_Host)
        self._streak = self._running = self._waiting = 0
        self._down_since: float | None = None
        self._pause = FIRST_PAUSE
        self._changed = asyncio.Condition()
        self._probe = asyncio.Lock()

    def closed(self, host: Hashable) -> Status | None:
        """How a download from a host that is being left alone ends; None: ask it."""
        state, now = self._hosts[host], time.monotonic()
        if state.closed_until == 0:
            return None
        if now < state.closed_until:
            return state.status
        state.closed_until = now + COOL_DOWN
        return None

    async def record(self, host: Hashable, status: Status, began: float) -> None:
        """An attempt that began at this time (of time.monotonic) has ended."""
        state = self._hosts[host]
        if status in SILENT:
            if state.silent == 0:
                state.since = time.monotonic()
            state.silent, state.status = state.silent + 1, status
            # In an outage no host answers, and none is to blame.
            if self.patience and state.silent >= TRIPS and self._proof > state.since:
                state.closed_until = time.monotonic() + COOL_DOWN
        elif status not in UNSENT:
            self._hosts[host] = _Host(known=True)
            self._proof = max(self._proof, began)
            self._streak = 0
            if self._down_since is not None:
                say(f"an answer after {time.monotonic() - self._down_since:.0f} s: going on")
                self._down_since, self._back = None, time.monotonic()
            await self._tell()

    @contextlib.asynccontextmanager
    async def download(self) -> AsyncIterator[None]:
        """Around all attempts at one download."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            await self._tell()

    async def believes(self, host: Hashable, began: float) -> bool:
        """Whether a download that began then and ended without an answer has failed; False: try it anew.

        Waits until others have got answers or not. Raises LlavaError if the network stays down.
        """
        if began < self._back:
            return False
        if self._hosts[host].known:
            began = time.monotonic()
        if not self.patience or self._proof > began:
            return True
        self._streak += 1
        self._waiting += 1
        try:
            await self._tell()
            await self._until(
                lambda: (
                    self._proof > began
                    or self._streak >= STREAK
                    or self._waiting == self._running  # nobody is left to hear from
                )
            )
            if self._proof > began or self._streak < STREAK:
                return True
            await self._outage(began)
            return False
        finally:
            self._waiting -= 1

    async def _outage(self, began: float) -> None:
        if self._down_since is None:
            self._down_since, self._pause = time.monotonic(), FIRST_PAUSE
            say(f"{self._streak} downloads in a row got no answer: the network seems down; waiting for it")
            if hint := proxy_hint():
                say(hint)
        async with self._probe:
            if self._proof > began or self._down_since is None:
                return
            if time.monotonic() - self._down_since > self.patience:
                raise LlavaError(
                    f"the network gave no answer for {self.patience:g} s",
                    do="run the same command again when it does; --patience 0 marks such rows as failed",
                )
            with contextlib.suppress(asyncio.TimeoutError):
                async with time_limit(self._pause):
                    await self._until(lambda: self._proof > began)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def _tell(self) -> None:
        if self._waiting:
            async with self._changed:
                self._changed.notify_all()


def proxy_hint() -> str | None:
    """What to say of a network that seems down where a proxy is set, which no download uses."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        if os.environ.get(name):
            return f"{name} is set, but images are asked for without a proxy"
    return None
