"""`extract inspect`: what shards hold, in the terminal and, with --html, as a page."""

from __future__ import annotations

from extract.config import InspectConfig
from extract.inspect.histogram import Histogram, bar
from extract.inspect.page import write_page
from extract.outcomes import outcome_table
from extract.statistics import Contents, look_into, stored_as
from llava_core.cli.console import human_bytes, say, show, table
from llava_core.shards.folder import open_shards
from llava_core.types import JsonDict

BINS, BAR = 10, 32
"""Of a histogram in the terminal: bins, and columns of the longest bar."""
HOSTS = 8
"""Hosts that are shown."""


def run(config: InspectConfig) -> JsonDict:
    """Print the outcomes, hosts and distributions; returns them as figures."""
    contents = look_into(open_shards(config.out))
    parts = [outcome_table(contents.figures), _totals(contents), *_histograms(contents)]
    if contents.hosts:
        parts.insert(1, _hosts(contents))
    show("\n\n".join(parts))
    if contents.not_finite_rows:
        say(
            f"{contents.not_finite_rows} of {contents.norm_rows} sampled rows hold NaN or infinite features; "
            "their norms are left out, and `train` would diverge on them"
        )
    if config.html is not None:
        write_page(config.html, contents, config.sample)
        say(f"page written: {config.html}")
        contents.figures["html"] = str(config.html)
    return contents.figures


def _hosts(contents: Contents) -> str:
    rows: list[tuple[str, ...]] = []
    for host, found in list(contents.hosts.items())[:HOSTS]:
        rows.append((host, f"{found.failed:,}", f"{found.rows:,}"))
        rows += [(f"  {label}", f"{n:,}") for label, n in found.by_status.items()]
    if (more := len(contents.hosts) - HOSTS) > 0:
        rows.append((f"and {more:,} more hosts",))
    return table(rows, ("host", "failed", "rows"))


def _totals(contents: Contents) -> str:
    figures, encoder = contents.figures, contents.figures["encoder"]
    stored = human_bytes(figures["feature_bytes"])
    return table(
        [
            ("shards", figures["shards"]),
            ("features", f"[{figures['tokens']}, {figures['width']}] an image, {stored}"),
            ("stored as", stored_as(figures["storage"])),
            ("encoder", f"{encoder.get('model_id')}, layer {encoder.get('layer') or 'after the final norm'}"),
            ("fingerprint", figures["fingerprint"][:12]),
            ("images", human_bytes(figures["image_bytes"])),
            ("caption characters", _quantiles(figures["caption_characters"])),
            (f"token norms ({contents.norm_rows} rows)", _quantiles(figures["token_norms"])),
        ]
    )


def _quantiles(values: JsonDict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _histograms(contents: Contents) -> list[str]:
    shapes = contents.histograms(BINS)
    return [_bars(name, shape) for name, shape in shapes.items() if shape is not None]


def _bars(name: str, shape: Histogram) -> str:
    lines = table([(name, ""), *zip(shape.labels, (f"{n:,}" for n in shape.counts), strict=True)]).split("\n")
    bars = [bar(n / max(shape.counts), BAR) for n in shape.counts]
    return "\n".join([lines[0], *(f"{line}  {b}".rstrip() for line, b in zip(lines[1:], bars, strict=True))])
