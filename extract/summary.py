"""How the rows of shards ended: counts by outcome, and the hosts that failed most."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from llava_core import __version__
from llava_core.console import table
from llava_core.fingerprint import JsonDict
from llava_core.shards import Shard
from llava_core.status import Status

TOP_HOSTS = 5


def summarise(shards: Sequence[Shard], hosts_shown: int | None = TOP_HOSTS) -> JsonDict:
    """rows, ok, failed, by_status {label: rows}, failed_hosts {host: rows}, image_bytes."""
    counts = collections.Counter(int(code) for shard in shards for code in shard.status)
    hosts: collections.Counter[str] = collections.Counter()
    for shard in shards:
        failed = (shard.status != Status.OK) & (shard.status != Status.BAD_CAPTION)
        hosts.update(host_of(shard.url(row)) for row in np.flatnonzero(failed).tolist())
    rows = sum(counts.values())
    return {
        "rows": rows,
        "ok": counts[Status.OK],
        "failed": rows - counts[Status.OK],
        "by_status": {Status(code).label: n for code, n in counts.most_common()},
        "failed_hosts": dict(hosts.most_common(hosts_shown)),
        "image_bytes": sum(int(shard.nbytes.sum(dtype=np.int64)) for shard in shards),
    }


def outcome_table(figures: JsonDict) -> str:
    rows = [(label, f"{n:,}", f"{n / figures['rows']:.2%}") for label, n in figures["by_status"].items()]
    return table(rows, ("outcome", "rows", "share"))


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
        "fingerprint": shard.fingerprint,
        "seconds": round(seconds, 2),
        **summarise([shard]),
    }
    path: Path = shard.path.with_suffix(".json")
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
