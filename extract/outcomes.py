"""How the rows of shards ended: counts by outcome, and the hosts that failed most."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from extract.sources.base import is_address
from llava_core import __version__
from llava_core.cli.console import table
from llava_core.filesystem import replace_text
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict

TOO_MANY_FAILED = 3
"""Exit code when more than --max-failed of the rows have failed."""
TOP_HOSTS = 5
BY_CODE = (Status.HTTP_4XX, Status.HTTP_5XX)
"""Outcomes that are told apart by their HTTP status code."""


def summarise(shards: Sequence[Shard], hosts_shown: int | None = TOP_HOSTS) -> JsonDict:
    """rows, ok, failed, by_status {label: rows}, by_http {label: {code: rows}} of failures that have a code,
    failed_hosts {host: rows}, image_bytes."""
    counts = collections.Counter(int(code) for shard in shards for code in shard.status)
    hosts: collections.Counter[str] = collections.Counter()
    for shard in shards:
        failed = (shard.status != Status.OK) & (shard.status != Status.BAD_CAPTION)
        urls = (shard.url(row) for row in np.flatnonzero(failed).tolist())
        hosts.update(host_of(url) for url in urls if not shard.local or is_address(url))
    rows = sum(counts.values())
    return {
        "rows": rows,
        "ok": counts[Status.OK],
        "failed": rows - counts[Status.OK],
        "by_status": {Status(code).label: n for code, n in counts.most_common()},
        "by_http": {status.label: codes for status in BY_CODE if (codes := _codes(shards, status))},
        "failed_hosts": dict(hosts.most_common(hosts_shown)),
        "image_bytes": sum(int(shard.nbytes.sum(dtype=np.int64)) for shard in shards),
    }


def outcome_table(figures: JsonDict) -> str:
    """Rows by outcome, those with an HTTP code by code below it."""
    rows: list[tuple[str, ...]] = []
    for label, n in figures["by_status"].items():
        rows.append((label, f"{n:,}", f"{n / figures['rows']:.2%}"))
        rows += [(f"  {code}", f"{of:,}") for code, of in figures["by_http"].get(label, {}).items()]
    return table(rows, ("outcome", "rows", "share"))


def _codes(shards: Sequence[Shard], status: Status) -> dict[str, int]:
    """Rows of that outcome by HTTP status code, the most frequent first."""
    codes = collections.Counter(
        code for shard in shards for code in shard.http[shard.status == status].tolist()
    )
    return {str(code): n for code, n in codes.most_common()}


def host_of(url: str) -> str:
    """The host alone: user names, passwords and queries stay out of every report."""
    try:
        return urlsplit(url).hostname or "(no host)"
    except ValueError:
        return "(no host)"


def write_statistics(shard: Shard, seconds: float) -> None:
    """`<stem>.json` beside a finished shard."""
    content: dict[str, Any] = {
        "version": 1,
        "tool_version": __version__,
        "shard": shard.path.name,
        "source": shard.source,
        "fingerprint": shard.identity.fingerprint,
        "seconds": round(seconds, 2),
        **summarise([shard]),
    }
    path: Path = shard.path.with_suffix(".json")
    replace_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
