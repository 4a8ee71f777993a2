"""The page of `extract inspect --html`: one file that asks nothing of any other.

Captions, ids and addresses come from strangers. All of them are escaped, of an address only the host is
shown, and the page's own policy lets nothing be fetched and nothing run but the script whose hash it names.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from extract.inspect.histogram import Histogram
from extract.inspect.svg import bars, outline, share_bar
from extract.sources.base import host_of
from extract.statistics import CacheStatistics, broken_down, fit_shown, spread, stored_as
from llava_core.cli.console import counted, human_bytes
from llava_core.cli.translation import translated, translated_label
from llava_core.filesystem import replace_text
from llava_core.report.page import report, section
from llava_core.report.tables import facts, table, totals
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict

PAGE = Path(__file__).with_name("page.html")
BINS = 24
HOSTS, SOURCES = 15, 15
"""Hosts, and source files, that are shown."""


def write_page(path: Path, stats: CacheStatistics, sample: int) -> None:
    """Write the page with a gallery of `sample` rows, 0 for all."""
    replace_text(path, _page(stats, sample))


def choose(shards: Sequence[Shard], sample: int) -> list[tuple[Shard, int]]:
    """Rows in their order, evenly spread; up to a quarter of them failed, with every outcome among them."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for k, shard in enumerate(shards):
        for row, status in enumerate(shard.status.tolist()):
            groups.setdefault(status, []).append((k, row))
    ok = groups.pop(Status.OK, [])
    mixed = itertools.zip_longest(*(spread(group, sample) for group in groups.values()))
    failed = [place for places in mixed for place in places if place]
    if sample:
        failed = failed[: max(sample // 4, sample - len(ok))]
        ok = spread(ok, sample - len(failed)) if len(failed) < sample else []
    return [(shards[k], row) for k, row in sorted(ok + failed)]


def _page(stats: CacheStatistics, sample: int) -> str:
    chosen = choose(stats.shards, sample)
    shapes = stats.histograms(BINS)
    parts = {
        "title": escape(stats.shards[0].path.resolve().parent.name),
        "subtitle": translated(f"Features by {escape(str(stats.figures['encoder'].get('model_id')))}"),
        "totals": _totals(stats.figures),
        "outcomes": share_bar(stats.figures["by_status"]) + _outcomes(stats),
        "hosts": _hosts(stats),
        "histograms": "".join(_chart(name, shape, stats) for name, shape in shapes.items() if shape),
        "rows": gallery(
            _sampled(stats, chosen),
            "outcome",
            _labels(chosen),
            [tile(shard, row) for shard, row in chosen],
            _facts(stats),
        ),
    }
    return report(PAGE, parts, "extract inspect --html")


def _bytes(n: int) -> str:
    number, unit = human_bytes(n).split()
    return f"{number} <small>{unit}</small>"


def _totals(figures: JsonDict) -> str:
    numbers = {
        "rows": f"{figures['rows']:,}",
        "hold features": f"{figures['ok'] / figures['rows']:.2%}",
        "failed": f"{figures['failed']:,}",
        "shards": f"{figures['shards']:,}",
        "of features": _bytes(figures["feature_bytes"]),
        "of images": _bytes(figures["image_bytes"]),
    }
    return totals(numbers)


def _outcomes(stats: CacheStatistics) -> str:
    rows = stats.figures["rows"]
    return table(
        ("outcome", "rows", "share"),
        (
            [
                ("", (label, f"{n:,}", f"{n / rows:.2%}")),
                *(("under", (code, f"{k:,}", "")) for code, k in broken_down(stats.figures, label).items()),
            ]
            for label, n in stats.figures["by_status"].items()
        ),
    )


def _hosts(stats: CacheStatistics) -> str:
    if not stats.hosts:
        return f'<p class="note">{translated("None.")}</p>'
    shown = list(stats.hosts.items())[:HOSTS]
    more = len(stats.hosts) - len(shown)
    return table(
        ("host", "failed", "of rows"),
        (
            [
                ("", (host, f"{found.failed:,}", f"{found.rows:,}")),
                *(("under", (label, f"{n:,}", "")) for label, n in found.by_status.items()),
            ]
            for host, found in shown
        ),
    ) + (f'<p class="note">{translated(f"and {more:,} more hosts")}</p>' if more else "")


def _chart(name: str, shape: Histogram, stats: CacheStatistics) -> str:
    found = stats.figures[name.replace(" ", "_")]
    of = counted(len(stats.lengths), "caption") if shape.whole else counted(stats.norm_rows, "row")
    words = translated(
        f"<b>{translated_label(name.capitalize())}</b> of {of}: median {found['p50']:,}, "
        f"95 % up to {found['p95']:,}, from {found['p0']:,} to {found['p100']:,}"
    )
    if stats.not_finite_rows and not shape.whole:
        words += translated(f"; {stats.not_finite_rows:,} rows hold NaN or infinite features, left out")
    return f"<figure>{bars(name, shape)}<figcaption>{words}</figcaption></figure>"


def _sampled(stats: CacheStatistics, chosen: Sequence[tuple[Shard, int]]) -> str:
    rows, failed = stats.figures["rows"], sum(Status(shard.status[row]).failed for shard, row in chosen)
    text = translated(f"All {rows:,} rows")
    if len(chosen) < rows:
        text = translated(f"{len(chosen):,} of {rows:,} rows, evenly spread")
        if failed:
            text += translated(f"; {failed:,} of them failed, more than their share")
    if not any(shard.layout.thumbnails for shard in stats.shards):
        text += translated(
            ". These shards keep no pictures: <code>extract run --thumbnails</code> makes some that do"
        )
    return text + translated(".")


def _labels(chosen: Sequence[tuple[Shard, int]]) -> list[str]:
    return [Status(code).label for code in sorted({int(shard.status[row]) for shard, row in chosen})]


def gallery(sampled: str, kind: str, choices: Iterable[str], tiles: Iterable[str], facts: str) -> str:
    """The sections with rows, which may be filtered by their `kind` (outcome, reason), and with facts."""
    options = "".join(f"<option>{choice}</option>" for choice in choices)
    parts = {
        "sampled": sampled,
        "kind": translated_label(kind),
        "choices": options,
        "tiles": "".join(tiles),
        "facts": facts,
    }
    return section(PAGE.with_name("gallery.html"), parts)


def tile(shard: Shard, row: int, verdict: str | None = None, notes: Sequence[str] = ()) -> str:
    """An entry of the gallery: picture, caption and where they are from; a `verdict` replaces the outcome as
    what the page filters by, and `notes` come first below the caption."""
    status = Status(int(shard.status[row]))
    kind = "failed" if status.failed else "" if status is Status.OK else "none"
    (height, width), ident = shard.orig_hw[row].tolist(), shard.id(row)
    caption = "\n".join(line for turn in shard.turns(row) for line in turn if line)
    where = [
        *map(escape, notes),
        escape(f"id {host_of(ident) if '://' in ident else ident}"),
        escape(host_of(shard.url(row))),
        f"{width}&nbsp;×&nbsp;{height}" if width else "",
        escape(shard.reason_of(row)) or (f"HTTP&nbsp;{shard.http[row]}" if kind and shard.http[row] else ""),
    ]
    spans = " ".join(f"<span>{text}</span>" for text in where if text)
    if kind:
        picture = escape(status.label)
    elif jpeg := shard.thumbnail(row):
        picture = f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" alt="">'
    else:
        picture = outline(width, height)
    return (
        f'<li data-outcome="{verdict or status.label}"{f" class={kind}" if kind else ""}><figure>'
        f'<div class="picture">{picture}</div><figcaption>'
        f'<p class="caption" dir="auto" tabindex="0">{escape(caption) or "<i>no caption</i>"}</p>'
        f'<p class="where">{spans}</p></figcaption></figure></li>'
    )


def _facts(stats: CacheStatistics) -> str:
    figures, sources = stats.figures, stats.figures["sources"]
    files = {
        str(source.get("name")): f"{source.get('rows', 0):,} rows, sha256 {str(source.get('sha256'))[:12]}…"
        for source in sources[:SOURCES]
    }
    if more := len(sources) - len(files):
        files["…"] = f"and {more:,} more"
    parts = {
        "Encoder": {
            **figures["encoder"],
            "fingerprint": figures["fingerprint"],
            "stored_as": stored_as(figures["storage"]),
        },
        "Preprocessing": {"fit": fit_shown(figures), **figures["preprocess"]},
        "Source files": files,
    }
    return facts({title: {k: shown(k, v) for k, v in values.items()} for title, values in parts.items()})


def shown(name: str, value: object) -> str:
    if name == "layer" and value is None:
        return translated("all tokens after the final norm")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
