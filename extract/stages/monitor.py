"""The live line: bytes a second, requests in flight, the bottleneck, failed rows."""

from __future__ import annotations

import asyncio

from extract.stages.download import Download
from extract.stages.metrics import Bottleneck, ProgressBar
from extract.stages.write import Write

INTERVAL = 0.5
"""Seconds between two updates."""


async def monitor(download: Download, write: Write, bottleneck: Bottleneck, bar: ProgressBar) -> None:
    """Sample the stages and update the progress bar until cancelled."""
    fetcher, rate = download.fetcher, 0.0
    while True:
        before = fetcher.received
        await asyncio.sleep(INTERVAL)
        rate += 0.3 * ((fetcher.received - before) / INTERVAL - rate)
        bottleneck.sample()
        parts = [f"{rate / 1e6:.1f} MB/s", f"{fetcher.in_flight} in flight", f"{bottleneck.now}-bound"]
        if write.failed:
            parts.append(f"{write.failed} failed")
        bar.set_postfix_str(", ".join(parts), refresh=False)
