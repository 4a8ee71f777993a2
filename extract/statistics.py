"""Statistics of feature shards: outcomes, hosts, captions and norms."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from extract.failed_files import failed_files
from extract.inspect.histogram import Histogram, histogram
from extract.sources.base import DataFlags, host_of, hosts_of, is_address
from llava_core import __version__
from llava_core.cli.console import table
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError
from llava_core.filesystem import replace_text
from llava_core.geometry import kept_share
from llava_core.row_status import Status
from llava_core.shards.reader import AT_ONCE, Shard, reason_text
from llava_core.types import JsonDict

TOO_MANY_FAILED = 3
"""Exit code when more than --max-failed of the rows have failed."""
TOP_HOSTS = 5
BY_CODE = (Status.HTTP_4XX, Status.HTTP_5XX)
"""Outcomes that are broken down by HTTP status code."""
ASKED_IN_VAIN = [status for status in Status if status.failed and not status.in_data]
"""Outcomes of rows whose image was asked for."""
REASONS, REASONS_SHOWN = 50, 5
"""Reasons of an outcome that are counted apart, and that the terminal and the page show."""
OTHERS = "other reasons"
SAMPLE = 256
"""Rows whose token norms are computed."""
QUANTILES = (0, 50, 95, 100)

Item = TypeVar("Item")


def summarise(shards: Sequence[Shard], hosts_shown: int | None = TOP_HOSTS) -> JsonDict:
    """Counts over shards: rows, ok, failed, by_status {label: rows}, by_http {label: {code: rows}} of
    failures with an HTTP status code, by_reason {label: {reason: rows}} with the REASONS most frequent ones,
    failed_hosts {host: rows}, `failed_files`, image_bytes."""
    counts = collections.Counter(code for shard in shards for code in shard.status.tolist())
    hosts: collections.Counter[str] = collections.Counter()
    for shard in shards:
        failed = np.isin(shard.status, ASKED_IN_VAIN)
        urls = (shard.url(row) for row in np.flatnonzero(failed).tolist())
        hosts.update(host_of(url) for url in urls if not shard.local or is_address(url))
    rows = sum(counts.values())
    return {
        "rows": rows,
        "ok": counts[Status.OK],
        "failed": sum(n for code, n in counts.items() if Status(code).failed),
        "by_status": {Status(code).label: n for code, n in counts.most_common()},
        "by_http": {status.label: codes for status in BY_CODE if (codes := _codes(shards, status))},
        "by_reason": _reasons(shards),
        "failed_hosts": dict(hosts.most_common(hosts_shown)),
        "failed_files": failed_files(shards),
        "image_bytes": sum(int(shard.nbytes.sum(dtype=np.int64)) for shard in shards),
    }


def outcome_table(figures: JsonDict) -> str:
    """Table of rows by outcome, and under each by HTTP status code or reason."""
    rows: list[tuple[str, ...]] = []
    for label, n in figures["by_status"].items():
        rows.append((label, f"{n:,}", f"{n / figures['rows']:.2%}"))
        rows += [(f"  {why}", f"{of:,}") for why, of in broken_down(figures, label).items()]
    return table(rows, ("outcome", "rows", "share"))


def broken_down(figures: JsonDict, label: str) -> dict[str, int]:
    """Rows of an outcome by HTTP status code, else by reason: the REASONS_SHOWN most frequent, and OTHERS."""
    if codes := figures["by_http"].get(label):
        return dict(codes)
    reasons = figures["by_reason"].get(label, {})
    shown = {why: n for why, n in list(reasons.items())[:REASONS_SHOWN] if why != OTHERS}
    more = sum(reasons.values()) - sum(shown.values())
    return {**shown, OTHERS: more} if more else shown


def _reasons(shards: Sequence[Shard]) -> dict[str, dict[str, int]]:
    """{outcome: {reason: rows}}, the most frequent first; all after the first REASONS are OTHERS."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for shard in shards:
        reasons = shard.reason
        known = np.flatnonzero(reasons != b"")
        pairs = zip(shard.status[known].tolist(), reasons[known].tolist(), strict=True)
        for (code, reason), n in collections.Counter(pairs).items():
            counts[Status(code).label][reason_text(reason)] += n
    by_reason = {}
    for label, of in counts.items():
        by_reason[label] = dict(of.most_common(REASONS))
        if more := of.total() - sum(by_reason[label].values()):
            by_reason[label][OTHERS] = more
    return by_reason


def _codes(shards: Sequence[Shard], status: Status) -> dict[str, int]:
    """{HTTP status code: rows} of this outcome, the most frequent first."""
    codes = collections.Counter(
        code for shard in shards for code in shard.http[shard.status == status].tolist()
    )
    return {str(code): n for code, n in codes.most_common()}


def write_statistics(shard: Shard, seconds: float, flags: object = None) -> None:
    """Write `<stem>.json` beside a finished shard; `flags` of the command say what it was made from."""
    content: dict[str, Any] = {
        "version": 1,
        "tool_version": __version__,
        "shard": shard.path.name,
        "source": shard.source,
        "fingerprint": shard.identity.fingerprint,
        "seconds": round(seconds, 2),
        **summarise([shard]),
        "made_from": made_from(shard),
    }
    if data := getattr(flags, "data", None):
        images = getattr(flags, "images", None)
        given = {**dataclasses.asdict(DataFlags.of(flags)), "images": images and os.path.abspath(images)}
        content["made_from"] = {"data": os.path.abspath(data), **given}
    replace_text(shard.path.with_suffix(".json"), json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def made_from(shard: Shard) -> JsonDict | None:
    """`data`, and the fields of DataFlags, that a shard was made from; None if nothing says so."""
    try:
        statistics = json.loads(shard.path.with_suffix(".json").read_text(encoding="utf-8"))
        return {"data": str(statistics["made_from"]["data"]), **statistics["made_from"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def data_flags_of(shard: Shard) -> tuple[str, DataFlags]:
    """--data and its flags of the command that made a shard. Raises LlavaError if nothing says so."""
    if (found := made_from(shard)) is None:
        raise LlavaError(f"{shard.path} was made from local images", do="give --data as to `extract run`")
    known: JsonDict = {field.name: found.get(field.name) for field in dataclasses.fields(DataFlags)}
    known["images"] = known["images"] and Path(known["images"])
    return found["data"], DataFlags(**known)


@dataclasses.dataclass(frozen=True)
class CacheStatistics:
    """Shards of one encoder, and the statistics over their rows."""

    shards: Sequence[Shard]
    lengths: np.ndarray
    """Characters of the captions of ok rows."""
    norms: np.ndarray
    """Finite L2 norms of all tokens of `norm_rows` ok rows."""
    norm_rows: int
    not_finite_rows: int
    """Rows of these that hold NaN or infinity."""
    hosts: dict[str, HostFailures]
    """Hosts with failures, the worst first."""
    figures: JsonDict
    """All statistics, for --json."""

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


def cache_statistics(shards: Sequence[Shard]) -> CacheStatistics:
    """Statistics of these shards; reads every text, and the features of SAMPLE rows."""
    lengths = np.concatenate([_characters(shard) for shard in shards])
    sample = spread([(shard, row) for shard in shards for row in shard.ok_rows()], SAMPLE)
    norms = [np.linalg.norm(shard.read(row).astype(np.float32), axis=-1) for shard, row in sample]
    norm = np.concatenate(norms) if norms else np.zeros(0, np.float32)
    norm = norm[np.isfinite(norm)]
    not_finite = sum(not np.isfinite(row).all() for row in norms)
    hosts = _by_host(shards)
    shapes = [kept_and_aspect(shard) for shard in shards]
    kept, aspect = (np.concatenate([shape[k] for shape in shapes]) for k in range(2))
    first = shards[0]
    statistics = CacheStatistics(
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
            "fit": first.identity.flags["fit"],
            "kept_area": quantiles(kept, 3),
            "aspect_ratio": quantiles(aspect, 3),
            "encoder": first.encoder,
            "preprocess": first.preprocess,
            "fingerprint": first.identity.fingerprint,
            "sources": [shard.source for shard in shards],
        },
    )
    charts = statistics.histograms(bins=20)
    statistics.figures["histograms"] = {
        name.replace(" ", "_"): shape.to_json() if shape else None for name, shape in charts.items()
    }
    return statistics


def kept_and_aspect(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Of each ok row's picture: the share of its area that the encoder sees, and longer over shorter side."""
    sides = np.maximum(1.0, np.sort(shard.orig_hw[shard.status == Status.OK], axis=1))
    aspect = sides[:, 1] / sides[:, 0]
    crop, size = str(shard.preprocess.get("crop")), int(shard.preprocess.get("size", 1))
    ratios, at = np.unique(aspect, return_inverse=True)
    return np.array([kept_share(crop, size, ratio) for ratio in ratios.tolist()])[at], aspect


def _characters(shard: Shard) -> np.ndarray:
    """Characters of the captions, or all answers, of ok rows."""
    if shard.conversations:
        turns = map(shard.turns, shard.ok_rows())
        return np.array([sum(len(answer) for _, answer in own) for own in turns], np.int64)
    starts = range(0, shard.rows, AT_ONCE)
    parts = [shard.caption_characters(start, min(start + AT_ONCE, shard.rows)) for start in starts]
    lengths: np.ndarray = np.concatenate([np.zeros(0, np.int64), *parts])[shard.status == Status.OK]
    return lengths


def fit_shown(figures: JsonDict) -> str:
    """What the fit makes of the median picture and of the most oblong one, in words."""
    aspect, kept = figures["aspect_ratio"], figures["kept_area"]
    ratio, most = max(1, aspect["p50"]), max(1, aspect["p100"])
    shown = {
        "crop": f"crop, keeps {kept['p50']:.0%} of a picture's area (median; {kept['p0']:.0%} at least)",
        "pad": f"pad, {1 - 1 / ratio:.0%} of a square is padding (median; {1 - 1 / most:.0%} at most)",
        "squash": f"squash, long side {ratio:.2f} × short (median; {most:.2f} at most)",
    }
    return translated(shown[figures["fit"]] if figures["fit"] in shown else "unknown")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spread; 0 takes all."""
    if not count or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def quantiles(values: np.ndarray, places: int) -> dict[str, float]:
    """{'p0': …, 'p50': …, 'p95': …, 'p100': …}; zeros if there is no value."""
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
        hosts = hosts_of(shard.urls())
        rows.update(hosts)
        for row in np.flatnonzero(np.isin(shard.status, ASKED_IN_VAIN)).tolist():
            failed[hosts[row]][Status(shard.status[row]).label] += 1
    found = [HostFailures(rows[host], dict(counts.most_common())) for host, counts in failed.items()]
    pairs = sorted(zip(failed, found, strict=True), key=lambda pair: (-pair[1].failed, pair[0]))
    return dict(pairs)
