"""`extract inspect`: what shards hold, in the terminal and, with --html, as a page."""

from __future__ import annotations

from extract.config import InspectConfig
from extract.failed_files import failed_lines
from extract.inspect.histogram import Histogram, bar
from extract.inspect.page import write_page
from extract.statistics import CacheStatistics, cache_statistics, fit_shown, outcome_table, stored_as
from llava_core.cli.console import human_bytes, say, show, table
from llava_core.cli.translation import translated
from llava_core.shards.folder import open_shards
from llava_core.types import JsonDict

BINS, BAR = 10, 32
"""Bins of a histogram in the terminal, and columns of its longest bar."""
HOSTS = 8
"""Hosts that are listed."""


def run(config: InspectConfig) -> JsonDict:
    """Print the outcomes, hosts and distributions; returns them as figures."""
    stats = cache_statistics(open_shards(config.out))
    outcomes = [outcome_table(stats.figures), *failed_lines(stats.figures)]
    parts = ["\n".join(outcomes), _totals(stats), *_histograms(stats)]
    if stats.hosts:
        parts.insert(1, _hosts(stats))
    show("\n\n".join(parts))
    if stats.not_finite_rows:
        say(
            f"{stats.not_finite_rows} of {stats.norm_rows} sampled rows hold NaN or infinite features; "
            "their norms are left out, and `train` would diverge on them"
        )
    if config.html is not None:
        write_page(config.html, stats, config.sample)
        say(f"page written: {config.html}")
        stats.figures["html"] = str(config.html)
    return stats.figures


def _hosts(stats: CacheStatistics) -> str:
    rows: list[tuple[str, ...]] = []
    for host, found in list(stats.hosts.items())[:HOSTS]:
        rows.append((host, f"{found.failed:,}", f"{found.rows:,}"))
        rows += [(f"  {label}", f"{n:,}") for label, n in found.by_status.items()]
    if (more := len(stats.hosts) - HOSTS) > 0:
        rows.append((f"and {more:,} more hosts",))
    return table(rows, ("host", "failed", "rows"))


def _totals(stats: CacheStatistics) -> str:
    figures, encoder = stats.figures, stats.figures["encoder"]
    stored = human_bytes(figures["feature_bytes"])
    return table(
        [
            ("shards", figures["shards"]),
            ("features", translated(f"[{figures['tokens']}, {figures['width']}] an image, {stored}")),
            ("stored as", stored_as(figures["storage"])),
            (
                "encoder",
                translated(
                    f"{encoder.get('model_id')}, layer {encoder.get('layer') or 'after the final norm'}"
                ),
            ),
            ("fit", fit_shown(figures)),
            ("fingerprint", figures["fingerprint"][:12]),
            ("images", human_bytes(figures["image_bytes"])),
            ("caption characters", _quantiles(figures["caption_characters"])),
            (translated(f"token norms ({stats.norm_rows} rows)"), _quantiles(figures["token_norms"])),
        ]
    )


def _quantiles(values: JsonDict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _histograms(stats: CacheStatistics) -> list[str]:
    shapes = stats.histograms(BINS)
    return [_bars(name, shape) for name, shape in shapes.items() if shape is not None]


def _bars(name: str, shape: Histogram) -> str:
    lines = table([(name, ""), *zip(shape.labels, (f"{n:,}" for n in shape.counts), strict=True)]).split("\n")
    bars = [bar(n / max(shape.counts), BAR) for n in shape.counts]
    return "\n".join([lines[0], *(f"{line}  {b}".rstrip() for line, b in zip(lines[1:], bars, strict=True))])
