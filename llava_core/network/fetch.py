"""Downloads from untrusted addresses: the only module that opens HTTP connections as a client."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import aiohttp
import yarl

from llava_core import __version__
from llava_core.network.address_guard import Hops, guarded_socket, hops
from llava_core.network.async_tasks import run_async, time_limit
from llava_core.network.client_errors import outcome_of
from llava_core.network.content_encoding import EncodingError, restored
from llava_core.network.fetch_limits import FetchLimits
from llava_core.network.outage import SILENT, OutageDetector
from llava_core.network.rate_limit import ByteBudget, HostRateLimit
from llava_core.network.request_url import BadAddress, redirect_url, request_url
from llava_core.network.response_head import MAX_FIELD_BYTES, MAX_HEADERS, MendingResponseHandler
from llava_core.network.retry import may_pass, pause_seconds, retry_after_seconds
from llava_core.network.x_robots_tag import refuses_use
from llava_core.row_status import Status

USER_AGENT = f"llava-align/{__version__} (feature extraction for research)"
SLOW_AFTER = 5.0
"""Seconds after the start of a body from which `min_rate` is required."""
CHUNK = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)
WHOLE = (200, 203)
"""Status codes of a whole image; 203 comes from a proxy that has changed something."""
SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")
"""Headers that do not follow a redirect to another host."""


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
    """Why there is no image, in words, without host or address, whose query may hold secrets."""
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
        self.agent = next((v for k, v in limits.headers if k.lower() == "user-agent"), USER_AGENT)
        """The User-Agent of requests."""
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Fetcher:
        # Semaphores outside the request bound them: waiting for the connector's would count as download time.
        connector = aiohttp.TCPConnector(
            limit=0,
            socket_factory=guarded_socket(self.limits.allow_private),
            force_close=not self.limits.private_redirects,  # every hop makes a socket, and is checked
        )
        handler = functools.partial(MendingResponseHandler, loop=asyncio.get_running_loop())
        connector._factory = handler  # type: ignore[assignment]
        limits: dict[str, Any] = {"max_line_size": MAX_FIELD_BYTES, "max_field_size": MAX_FIELD_BYTES}
        if "max_headers" in inspect.signature(aiohttp.ClientSession).parameters:  # not in aiohttp 3.12
            limits["max_headers"] = MAX_HEADERS
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_timeout),
            headers={"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
            **limits,
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
            parsed = request_url(url)
        except BadAddress as error:
            return Fetched(Status.BAD_URL, attempts=0, detail=str(error))
        host = str(parsed.host)
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
        except asyncio.TimeoutError as error:  # TimeoutError itself from Python 3.11 on, and aiohttp's
            limit = f"not done within {self.limits.timeout:g} s"
            words = outcome_of(error)[1] if isinstance(error, aiohttp.ClientError) else limit
            return Fetched(Status.TIMEOUT, detail=words)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            status, detail = outcome_of(error)
            return Fetched(status, detail=detail)
        finally:
            self.in_flight -= 1

    async def _get(self, url: yarl.URL) -> Fetched:
        """Request `url`, and what it redirects to."""
        headers = self.limits.headers
        for _ in range(self.limits.max_redirects + 1):
            if url.raw_user is not None:  # aiohttp refuses it beside the header
                headers = (*_without(headers, "authorization"), ("Authorization", _basic(url)))
                url = url.with_user(None)
            answer = await self._request(url, headers)
            if isinstance(answer, Fetched):
                return answer
            if route := hops.get():
                route.redirected()
            target = redirect_url(url, answer)
            if not _same_site(url, target):
                headers = _without(headers, *SECRET_HEADERS)
            url = target
        return Fetched(Status.TOO_MANY_REDIRECTS, detail=f"over {self.limits.max_redirects} redirects")

    async def _request(self, url: yarl.URL, headers: Sequence[tuple[str, str]]) -> Fetched | str:
        """The outcome of one request, or the Location that it redirects to."""
        limits = self.limits
        assert self._session is not None
        async with self._session.get(url, headers=headers, allow_redirects=False) as response:
            http = response.status
            if http in REDIRECTS and (location := response.headers.get("Location")):
                return location
            if http >= 400:
                status = Status.HTTP_4XX if http < 500 else Status.HTTP_5XX
                wait = retry_after_seconds(response.headers.get("Retry-After"))
                return Fetched(status, http=http, detail=f"HTTP {http}", retry_after=wait)
            robots = response.headers.getall("X-Robots-Tag", ())
            if not limits.ignore_robots and refuses_use(robots, self.agent):
                return Fetched(Status.ROBOTS, http=http, detail="X-Robots-Tag")
            if http not in WHOLE:
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
                whole = bytes(body)
                if encodings := ",".join(response.headers.getall("Content-Encoding", ())):
                    try:
                        whole = await asyncio.to_thread(restored, whole, encodings, limits.max_bytes)
                    except EncodingError as error:
                        return Fetched(error.status, http=http, detail=str(error))
                self.memory.hold(len(whole))
                return Fetched(Status.OK, whole, http)

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


def _without(headers: Sequence[tuple[str, str]], *names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in headers if name.lower() not in names)


def _basic(url: yarl.URL) -> str:
    """Value of the Authorization header for the user and password in `url`."""
    return "Basic " + base64.b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()


def _same_site(url: yarl.URL, target: yarl.URL) -> bool:
    """Whether secrets may follow a redirect: to the same scheme, host and port, or from http to https."""
    upgraded = (url.scheme, url.port, target.scheme, target.port) == ("http", 80, "https", 443)
    return url.raw_host == target.raw_host and (upgraded or url.origin() == target.origin())
