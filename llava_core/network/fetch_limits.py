"""Limits of a download, and what its requests say."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class FetchLimits:
    """Limits on time, bytes, attempts and concurrency of downloads, the addresses they may reach, and what
    their requests say."""

    timeout: float = 30.0
    """Seconds for one attempt: connection, redirects and body together."""
    connect_timeout: float = 10.0
    """Seconds of `timeout` for the connection."""
    min_rate: float = 2000.0
    """Bytes per second, averaged over the body so far, below which a download is given up."""
    max_bytes: int = 20_000_000
    """Bytes of the largest body."""
    max_redirects: int = 5
    retries: int = 2
    """Further attempts after one that failed for a reason that may pass."""
    concurrency: int = 64
    """Requests at a time."""
    per_host: int = 16
    """Requests at a time to one host."""
    host_rate: float | None = None
    """Requests a second to one host; None: as many as it answers."""
    bytes_in_flight: float = math.inf
    """Bytes of bodies between download and `Fetcher.release` above which no request begins."""
    allow_private: bool = False
    """Let loopback and private addresses through."""
    private_redirects: bool = True
    """With `allow_private`: let a public address, too, redirect to a private one."""
    ignore_robots: bool = False
    """Keep images whose X-Robots-Tag asks not to be used."""
    headers: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)
    """Further headers of each request, or others than the usual; they may hold secrets."""
    patience: float = 0.0
    """Seconds to wait while no host answers (`outage.py`); with 0 every failure is final."""
