"""How the plots of a sweep look: colours on light and dark paper, outliers, PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Theme = dict[str, str]
LABELS = 8
"""Values of a list that are written beside its axis; of more, this many, evenly spread."""
OUTLIER = 4.0
"""Losses more than this many times further above the best than the median is are drawn at the edge."""
LIGHT = {"paper": "#ffffff", "ink": "#1f1e1b", "line": "#dedad2", "best": "#b4532f", "other": "#0072b2"}
DARK = {"paper": "#161614", "ink": "#e9e6df", "line": "#4a4740", "best": "#f0a07c", "other": "#56b4e9"}
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that differ for colour-blind readers, too; on dark paper the last comes first."""
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^vP*"
SHADES = {"#ffffff": (0.05, 0.85), "#161614": (0.3, 1.0)}
"""The part of the colour map, from the best loss to the worst, that is seen on each paper."""


def new_figure(width: float = 7) -> tuple[Figure, Any]:
    """An empty figure, `width` inches wide, and its axes; without pyplot, which would keep it."""
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    return figure, figure.subplots()


def top_of(losses: Sequence[float]) -> float:
    """The highest loss that is drawn to scale: a run that diverged would flatten all others."""
    ordered = sorted(losses)
    low, median = ordered[0], ordered[len(ordered) // 2]
    reach = max(OUTLIER * (median - low), 0.05 * abs(low))
    return min(ordered[-1], low + reach)


def limit_losses(axes: Any, losses: Sequence[float], top: float) -> None:
    low = min(losses)
    margin = 0.07 * (top - low) or 0.05 * abs(low) or 1.0
    axes.set_ylim(low - margin, top + margin)


def colour(theme: Theme, number: int) -> str:
    """The colour of one of a few lines."""
    colours = OKABE_ITO if theme["other"] == OKABE_ITO[0] else OKABE_ITO[::-1]
    return colours[number % len(colours)]


def shade(theme: Theme, share: float) -> Any:
    low, high = SHADES[theme["paper"]]
    return matplotlib.colormaps["viridis"](low + (high - low) * share)


def render(draw: Callable[[Theme], Figure], theme: Theme, png: Path | None = None) -> str:
    """A figure in the colours of a theme as SVG; as a PNG, too, if a path is given."""
    ink, line, paper = theme["ink"], theme["line"], theme["paper"]
    settings = {
        **{f"{part}.color": ink for part in ("text", "xtick", "ytick")},
        "axes.labelcolor": ink,
        "axes.edgecolor": line,
        "grid.color": line,
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "sweep",
    }
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        made = draw(theme)
        if png:
            made.savefig(png, format="png", dpi=150)
        made.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()
