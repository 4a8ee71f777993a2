"""Downloads from untrusted addresses: the only module that opens HTTP connections as a client."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import aiohttp
import yarl

from llava_core import __version__
from llava_core.network.address_guard import ForbiddenAddress, Hops, guarded_socket, hops
from llava_core.network.async_tasks import run_async, time_limit
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.outage import SILENT, OutageDetector
from llava_core.network.rate_limit import ByteBudget, HostRateLimit
from llava_core.network.retry import may_pass, pause_seconds, retry_after_seconds
from llava_core.row_status import Status

USER_AGENT = f"llava-align/{__version__} (feature extraction for research)"
SLOW_AFTER = 5.0
"""Seconds after the start of a body from which `min_rate` is required."""
CHUNK = 1 << 16
DISALLOWED = {"noai", "noimageai", "noindex", "noimageindex"}
"""Directives of X-Robots-Tag that exclude an image."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Outcome of a download."""

    status: Status
    body: bytes = b""
    """Complete if the status is OK, else empty."""
    http: int = 0
    """Last HTTP status code; 0 if there was no answer."""
    attempts: int = 1
    detail: str = ""
    """What happened, without the address: its query may hold secrets."""
    retry_after: float | None = None
    """Seconds to wait, as the server asks."""
    mtime: int = 0
    """Modification time of a local file, in ns since 1970; 0 for a download."""


class Fetcher:
    """An HTTP client that raises for nothing the network does but a long outage; use it in `async with`."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self._outage = OutageDetector(limits.patience)
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._hosts: dict[str, HostRateLimit] = collections.defaultdict(
            lambda: HostRateLimit(limits.per_host, limits.host_rate)
        )
        self.memory = ByteBudget(limits.bytes_in_flight)
        """Bytes of bodies that are being received or have not been released."""
        self.in_flight = 0
        """Requests under way."""
        self.received = 0
        """Bytes of bodies received so far."""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Fetcher:
        # Semaphores outside the request bound them: waiting for the connector's would count as download time.
        connector = aiohttp.TCPConnector(
            limit=0,
            socket_factory=guarded_socket(self.limits.allow_private),
            force_close=not self.limits.private_redirects,  # every hop makes a socket, and is checked
        )
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_redirected)
        self._session = aiohttp.ClientSession(
            connector=connector,
            trace_configs=[trace],
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_timeout),
            headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def fetch(self, url: str) -> Fetched:
        """Download `url`, with retries and growing pauses after failures that may pass.

        The body counts as in flight until `release`.
        Raises LlavaError if the network stays down for `patience` seconds.
        """
        try:
            parsed = yarl.URL(url.strip())
            host = parsed.host
        except ValueError as error:
            return Fetched(Status.BAD_URL, attempts=0, detail=str(error))
        if parsed.scheme not in ("http", "https") or not host:
            return Fetched(Status.BAD_URL, attempts=0, detail="expected http:// or https:// and a host")
        async with self._outage.download():
            while True:
                began = time.monotonic()
                fetched = await self._attempts(parsed, host)
                if fetched.status not in SILENT or await self._outage.confirm_failure(
                    (host, parsed.port), began
                ):
                    return fetched

    def release(self, fetched: Fetched) -> None:
        """Count its body as no longer in memory."""
        self.memory.release(len(fetched.body))

    async def _attempts(self, url: yarl.URL, host: str) -> Fetched:
        rate_limit = self._hosts[host]
        for attempt in range(1, self.limits.retries + 2):
            async with rate_limit.turn(self._slots, self.memory):
                if status := self._outage.open_circuit((host, url.port)):
                    return Fetched(status, attempts=attempt - 1, detail="its host answers nobody")
                began = time.monotonic()
                fetched = dataclasses.replace(await self._attempt(url), attempts=attempt)
            await self._outage.record((host, url.port), fetched.status, began)
            if fetched.retry_after:
                rate_limit.pause(fetched.retry_after)
            if not may_pass(fetched.status, fetched.http) or attempt > self.limits.retries:
                break
            await asyncio.sleep(pause_seconds(attempt))
        return fetched

    async def _attempt(self, url: yarl.URL) -> Fetched:
        self.in_flight += 1
        hops.set(None if self.limits.private_redirects else Hops())
        try:
            async with time_limit(self.limits.timeout):
                return await self._get(url)
        except asyncio.TimeoutError:  # TimeoutError itself from Python 3.11 on
            return Fetched(Status.TIMEOUT, detail=f"not done within {self.limits.timeout:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            status = _status_of(error)
            forbidden = status is Status.FORBIDDEN_ADDRESS
            return Fetched(status, detail=str(ForbiddenAddress()) if forbidden else type(error).__name__)
        finally:
            self.in_flight -= 1

    async def _get(self, url: yarl.URL) -> Fetched:
        limits = self.limits
        assert self._session is not None
        async with self._session.get(url, max_redirects=limits.max_redirects) as response:
            http = response.status
            if http >= 400:
                status = Status.HTTP_4XX if http < 500 else Status.HTTP_5XX
                wait = retry_after_seconds(response.headers.get("Retry-After"))
                return Fetched(status, http=http, detail=f"HTTP {http}", retry_after=wait)
            if not limits.ignore_robots and refuses_use(response.headers.getall("X-Robots-Tag", ())):
                return Fetched(Status.ROBOTS, http=http, detail="X-Robots-Tag")
            if http != 200:
                return Fetched(Status.PROTOCOL, http=http, detail=f"HTTP {http}")
            if (response.content_length or 0) > limits.max_bytes:
                return Fetched(
                    Status.TOO_LARGE, http=http, detail=f"{response.content_length:,} bytes announced"
                )
            with self._held() as body:
                started = time.monotonic()
                async for chunk in response.content.iter_chunked(CHUNK):
                    body += chunk
                    self.memory.hold(len(chunk))
                    self.received += len(chunk)
                    if len(body) > limits.max_bytes:
                        return Fetched(Status.TOO_LARGE, http=http, detail=f"over {limits.max_bytes:,} bytes")
                    elapsed = time.monotonic() - started
                    if elapsed > SLOW_AFTER and len(body) < limits.min_rate * elapsed:
                        rate = f"{len(body) / elapsed:.0f} bytes/s"
                        return Fetched(Status.TOO_SLOW, http=http, detail=rate)
                self.memory.hold(len(body))
                return Fetched(Status.OK, bytes(body), http)

    @contextlib.contextmanager
    def _held(self) -> Iterator[bytearray]:
        """Buffer of a body being received, counted in `memory` until the end of the block."""
        body = bytearray()
        try:
            yield body
        finally:
            self.memory.release(len(body))


def fetch_each(urls: Sequence[str], limits: FetchLimits, take: Callable[[int, Fetched], object]) -> None:
    """Download outside any event loop; `take` is called with the index in `urls` and each result as it comes.

    A body counts as in flight until `take` returns.
    """

    async def fetch(fetcher: Fetcher, index: int, url: str) -> None:
        fetched = await fetcher.fetch(url)
        try:
            take(index, fetched)
        finally:
            fetcher.release(fetched)

    async def fetch_them() -> None:
        async with Fetcher(limits) as fetcher:
            await asyncio.gather(*(fetch(fetcher, index, url) for index, url in enumerate(urls)))

    run_async(fetch_them())


def fetch_all(
    urls: Sequence[str], limits: FetchLimits, done: Callable[[], object] = lambda: None
) -> list[Fetched]:
    """Download outside any event loop; results in the order of `urls`. `done` is called after each."""
    found: dict[int, Fetched] = {}

    def take(index: int, fetched: Fetched) -> None:
        found[index] = fetched
        done()

    fetch_each(urls, limits, take)
    return [found[index] for index in range(len(urls))]


def refuses_use(tags: Sequence[str]) -> bool:
    """Whether X-Robots-Tag asks every agent, or this one by name, not to use the image.

    The directives are those img2dataset honours; `other-bot: noai` does not apply.
    """
    for tag in tags:
        agent, colon, directives = tag.rpartition(":")
        if colon and agent.strip().lower() not in ("*", USER_AGENT.split("/")[0]):
            continue
        if {word.strip().lower() for word in directives.split(",")} & DISALLOWED:
            return True
    return False


async def _redirected(*_: object) -> None:
    if route := hops.get():
        route.redirected()


def _status_of(error: Exception) -> Status:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ForbiddenAddress):
        return Status.FORBIDDEN_ADDRESS
    kinds: list[tuple[Any, Status]] = [
        (ForbiddenAddress, Status.FORBIDDEN_ADDRESS),
        (aiohttp.TooManyRedirects, Status.TOO_MANY_REDIRECTS),
        ((aiohttp.InvalidURL, aiohttp.NonHttpUrlRedirectClientError), Status.BAD_URL),
        (aiohttp.ClientConnectorDNSError, Status.DNS),
        ((aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError), Status.TLS),
        (aiohttp.ServerTimeoutError, Status.TIMEOUT),
        (aiohttp.ClientConnectorError, Status.CONNECT),
        (aiohttp.ClientPayloadError, Status.TRUNCATED),
    ]
    return next((status for kind, status in kinds if isinstance(error, kind)), Status.PROTOCOL)
