"""Held-out loss against the operations spent: where each point of a sweep ends, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from llava_core.cli.console import human_operations
from train.sweep.plot_style import LABELS, Theme, limit_losses, new_figure, top_of
from train.sweep.rows import Row
from train.sweep.space import shown

NAMED = 12
"""Most points with their values beside them; of more, those on the front alone."""
SAME = 1.02
"""Operations within this factor are the same cost: a budget buys whole steps."""
NARROWEST = 1.1
"""Operations are drawn to at least this factor on both sides of the middle: a few per cent are no trend."""
APART = 12
"""Least distance of two labels, in points."""


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats at the same cost or less, the cheapest first."""

    def beaten(row: Row) -> bool:
        most = SAME * (row.operations or 0)
        return any((o.loss or 0) < (row.loss or 0) and (o.operations or 0) <= most for o in rows)

    return sorted((row for row in rows if not beaten(row)), key=lambda row: row.operations or 0)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a place in the picture."""
    return [row for row in rows if row.finished and row.operations]


def pareto(rows: Sequence[Row], theme: Theme) -> Figure:
    """A mark for the mean of each row's seeds, a bar from the lowest to the highest of them."""
    known = comparable(rows)
    best = front(known)
    figure, axes = new_figure()
    losses = [record.loss for row in known for record in row.finished if record.loss is not None]
    top = top_of(losses)
    axes.set_xscale("log")
    thin_label = "a run"
    for record in (record for row in known for record in row.finished):
        cost = record.summary.get("operations", 0) / max(1, record.summary.get("steps", 0))
        line = [(cost * step, loss) for step, loss in record.curve if step]
        if len(line) > 1:
            thin = {"color": theme["ink"], "alpha": 0.3, "linewidth": 0.8}
            axes.plot(*zip(*line, strict=True), **thin, zorder=1, label=thin_label)
            thin_label = ""
    for row in known:
        own = [min(record.loss, top) for record in row.finished if record.loss is not None]
        if len(own) > 1:
            axes.plot([row.operations] * 2, [min(own), max(own)], color=theme["other"], linewidth=1, zorder=2)
    for label, chosen, style in (
        ("on the front", best, {"marker": "o", "color": theme["best"]}),
        (
            "beaten at the same cost or less",
            [row for row in known if row not in best],
            {"marker": "s", "facecolors": "none", "edgecolors": theme["other"]},
        ),
    ):
        if chosen:
            places = [(row.operations or 0, min(row.loss or 0, top)) for row in chosen]
            axes.scatter(*zip(*places, strict=True), s=36, linewidths=1.4, zorder=3, label=label, **style)
    if len(best) > 1:
        places = [(row.operations or 0, row.loss or 0) for row in best]
        axes.step(
            *zip(*places, strict=True), where="post", color=theme["best"], label="Pareto front", zorder=2
        )
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=4)
    axes.set(
        xlabel="operations of all steps (FLOP: floating-point operations)",
        ylabel="held-out loss (nats per answer token)",
    )
    limit_losses(axes, losses, top)
    low, high = axes.get_xlim()
    middle = math.sqrt(low * high)
    low, high = min(low, middle / NARROWEST), max(high, middle * NARROWEST)
    axes.set_xlim(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 3, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 2:  # as by an equal budget
        ticks = [tick for tick in MaxNLocator(LABELS - 1).tick_values(low, high) if low <= tick <= high]
    ticks = ticks[:: -(-len(ticks) // LABELS)]
    axes.set_xticks(ticks, [human_operations(tick) for tick in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(linewidth=0.5)
    keys = [key for key in known[0].point if len({row.point.get(key) for row in known}) > 1]
    _label(figure, axes, known if len(known) <= NAMED else best, keys, top, theme)
    return figure


def _label(
    figure: Figure, axes: Any, rows: Sequence[Row], keys: Sequence[str], top: float, theme: Theme
) -> None:
    """Write each row's values of `keys` beside its mark, no two of them on each other."""
    left, right = axes.get_xlim()
    last, scale = -math.inf, figure.dpi / 72
    for row in sorted(rows, key=lambda row: row.loss or 0):
        place = (row.operations or 0, min(row.loss or 0, top))
        _, up = axes.transData.transform(place)
        last = max(up, last + APART * scale)
        leftwards = place[0] > math.sqrt(left * right)
        axes.annotate(
            ", ".join(shown(row.point[key]) for key in keys if key in row.point),
            place,
            xytext=(-7 if leftwards else 7, (last - up) / scale),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="center",
            fontsize=8.5,
            zorder=4,
            path_effects=[withStroke(linewidth=3, foreground=theme["paper"])],
        )
