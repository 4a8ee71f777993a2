"""Outage detection: a dead host is told from a dead network, so that an outage marks no row as failed.

A download without an answer counts as its host's failure only once an attempt that began after the failure
got an answer (for a host that has never answered: one that began after the download did). After STREAK such
downloads in a row, with no answer between them, the network is taken to be down: everything pauses, one
download at a time tries again, and all go on once one gets an answer.
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
"""Outcomes of an attempt without an answer."""
UNSENT = (Status.BAD_URL, Status.FORBIDDEN_ADDRESS)
"""Outcomes of an attempt that sent no request."""
STREAK = 20
"""Downloads in a row without an answer that make an outage."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds between two attempts at a network that is down; they double."""
HOST_FAILURES_TO_OPEN = 16
"""Attempts in a row without an answer, while others answer, that open a host's circuit: it is not asked."""
COOL_DOWN = 60.0
"""Seconds that a circuit stays open; then one attempt asks the host again."""


@dataclasses.dataclass
class _Host:
    silent: int = 0
    """Attempts in a row without an answer."""
    status: Status = Status.CONNECT
    """Outcome of the last of them."""
    since: float = 0.0
    """When the first of them ended."""
    known: bool = False
    """Whether it has answered before."""
    open_until: float = 0.0
    """When its circuit closes again; 0 if it is closed."""


class OutageDetector:
    """State of the network and its hosts, as the downloads of one event loop find it.

    The network may be down for `patience` seconds before LlavaError is raised; with 0 every failure is final.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._proof = 0.0
        """When the latest attempt began that got any answer."""
        self._back = 0.0
        """When the latest outage ended: downloads that began earlier may have failed because of it."""
        self._hosts: dict[Hashable, _Host] = defaultdict(_Host)
        self._streak = self._running = self._waiting = 0
        self._down_since: float | None = None
        self._pause = FIRST_PAUSE
        self._changed = asyncio.Condition()
        self._probe = asyncio.Lock()

    def open_circuit(self, host: Hashable) -> Status | None:
        """Outcome of a download from a host that is not asked for now; None if it may be asked."""
        state, now = self._hosts[host], time.monotonic()
        if state.open_until == 0:
            return None
        if now < state.open_until:
            return state.status
        state.open_until = now + COOL_DOWN
        return None

    async def record(self, host: Hashable, status: Status, began: float) -> None:
        """Count the outcome of an attempt that `began` then (time.monotonic)."""
        state = self._hosts[host]
        if status in SILENT:
            if state.silent == 0:
                state.since = time.monotonic()
            state.silent, state.status = state.silent + 1, status
            # In an outage no host answers, and none is at fault.
            if self.patience and state.silent >= HOST_FAILURES_TO_OPEN and self._proof > state.since:
                state.open_until = time.monotonic() + COOL_DOWN
        elif status not in UNSENT:
            self._hosts[host] = _Host(known=True)
            self._proof = max(self._proof, began)
            self._streak = 0
            if self._down_since is not None:
                say(f"an answer after {time.monotonic() - self._down_since:.0f} s: going on")
                self._down_since, self._back = None, time.monotonic()
            await self._notify()

    @contextlib.asynccontextmanager
    async def download(self) -> AsyncIterator[None]:
        """Context of one download, all its attempts together."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            await self._notify()

    async def confirm_failure(self, host: Hashable, began: float) -> bool:
        """Whether a download that `began` then and got no answer has failed; False: try it again.

        Waits for the outcome of other downloads. Raises LlavaError if the network stays down.
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
            await self._notify()
            await self._until(
                lambda: (
                    self._proof > began
                    or self._streak >= STREAK
                    or self._waiting == self._running  # no other download is left
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

    async def _notify(self) -> None:
        if self._waiting:
            async with self._changed:
                self._changed.notify_all()


def proxy_hint() -> str | None:
    """Hint for a network that seems down where a proxy is set, since no download uses it."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        if os.environ.get(name):
            return f"{name} is set, but images are asked for without a proxy"
    return None
