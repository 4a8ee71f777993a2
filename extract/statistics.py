"""What feature shards hold, gathered once for the terminal, `--json` and the page of `extract inspect`."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from extract.inspect.histogram import Histogram, histogram
from extract.outcomes import host_of, summarise
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict

SAMPLE = 256
"""Rows whose norms are looked at."""
QUANTILES = (0, 50, 95, 100)

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Contents:
    """Shards of one encoder, and what was counted in them."""

    shards: Sequence[Shard]
    lengths: np.ndarray
    """Characters of the captions of ok rows."""
    norms: np.ndarray
    """L2 norms of all tokens of `norm_rows` ok rows that are finite numbers."""
    norm_rows: int
    not_finite_rows: int
    """Of those rows, the ones with a token that holds NaN or infinity."""
    hosts: dict[str, HostFailures]
    """Hosts with failures, the worst first."""
    figures: JsonDict
    """All of it for --json."""

    def histograms(self, bins: int) -> dict[str, Histogram | None]:
        return {
            "caption characters": histogram(self.lengths, bins, whole=True),
            "token norms": histogram(self.norms, bins),
        }


@dataclasses.dataclass(frozen=True)
class HostFailures:
    rows: int
    by_status: dict[str, int]
    """Failed rows by outcome, the most frequent first."""

    @property
    def failed(self) -> int:
        return sum(self.by_status.values())


def look_into(shards: Sequence[Shard]) -> Contents:
    """Read every text and the features of a sample."""
    ok = [(shard, row) for shard in shards for row in shard.ok_rows()]
    lengths = np.array([sum(len(said) for _, said in shard.turns(row)) for shard, row in ok], np.int64)
    sample = spread(ok, SAMPLE)
    norms = [np.linalg.norm(shard.read(row).astype(np.float32), axis=-1) for shard, row in sample]
    norm = np.concatenate(norms) if norms else np.zeros(0, np.float32)
    norm = norm[np.isfinite(norm)]
    not_finite = sum(not np.isfinite(row).all() for row in norms)
    hosts = _by_host(shards)
    first = shards[0]
    contents = Contents(
        shards,
        lengths,
        norm,
        len(sample),
        not_finite,
        hosts,
        {
            **summarise(shards),
            "shards": len(shards),
            "storage": dict(collections.Counter(shard.layout.storage for shard in shards)),
            "feature_bytes": sum(s.layout.sizes[part] for s in shards for part in s.layout.parts),
            "tokens": first.tokens,
            "width": first.width,
            "failures_by_host": {
                host: {"rows": found.rows, "failed": found.failed, "by_status": found.by_status}
                for host, found in hosts.items()
            },
            "caption_characters": quantiles(lengths, 0),
            "token_norms": quantiles(norm, 3),
            "not_finite_rows": not_finite,
            "encoder": first.encoder,
            "preprocess": first.preprocess,
            "fingerprint": first.identity.fingerprint,
            "sources": [shard.source for shard in shards],
        },
    )
    shapes = contents.histograms(bins=20)
    contents.figures["histograms"] = {
        name.replace(" ", "_"): shape.to_json() if shape else None for name, shape in shapes.items()
    }
    return contents


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread; 0 takes all."""
    if not count or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def quantiles(values: np.ndarray, places: int) -> dict[str, float]:
    """{'p0': …, 'p50': …, 'p95': …, 'p100': …}; zeros of no values."""
    found = np.percentile(values if len(values) else np.zeros(1), QUANTILES)
    return {
        f"p{q}": round(float(v), places) if places else int(v) for q, v in zip(QUANTILES, found, strict=True)
    }


def stored_as(counts: dict[str, int]) -> str:
    """int8, or where there are several: int8 (3 of 4 shards), float16 (1 of 4 shards)."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({n} of {sum(counts.values())} shards)" for name, n in counts.items())


def _by_host(shards: Sequence[Shard]) -> dict[str, HostFailures]:
    rows: collections.Counter[str] = collections.Counter()
    failed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for shard in shards:
        for row, status in enumerate(shard.status.tolist()):
            rows[host := host_of(shard.url(row))] += 1
            if status not in (Status.OK, Status.BAD_CAPTION):  # the latter were not asked for
                failed[host][Status(status).label] += 1
    found = [HostFailures(rows[host], dict(counts.most_common())) for host, counts in failed.items()]
    pairs = sorted(zip(failed, found, strict=True), key=lambda pair: (-pair[1].failed, pair[0]))
    return dict(pairs)
