"""Held-out loss against the operations spent: where each point of a sweep ends, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from train.sweep.plot_style import Theme, limit_losses, new_figure, top_of
from train.sweep.rows import Row
from train.sweep.space import words

NAMED = 12
"""Most points with their values beside them; of more, those on the front alone."""
APART = 12
"""Least distance of two labels, in points."""


def front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats at the same operations or fewer, the cheapest first."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.operations or 0, row.loss or 0)):
        if not kept or (row.loss or 0) < (kept[-1].loss or 0):
            kept.append(row)
    return kept


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
    for row in known:
        own = [min(record.loss, top) for record in row.finished if record.loss is not None]
        if len(own) > 1:
            axes.plot([row.operations] * 2, [min(own), max(own)], color=theme["other"], linewidth=1, zorder=2)
        for record in row.finished:
            cost = record.summary.get("operations", 0) / max(1, record.summary.get("steps", 0))
            if line := [(cost * step, min(loss, top)) for step, loss in record.curve if step]:
                axes.plot(*zip(*line, strict=True), color=theme["line"], linewidth=0.8, zorder=1)
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
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=3)
    axes.set(xlabel="operations for all steps (FLOP)", ylabel="held-out loss (nats per answer token)")
    limit_losses(axes, losses, top)
    axes.grid(linewidth=0.5)
    _label(figure, axes, known if len(known) <= NAMED else best, top)
    return figure


def _label(figure: Figure, axes: Any, rows: Sequence[Row], top: float) -> None:
    """Write each row's values beside its mark, no two of them on each other."""
    keys = [key for key in rows[0].point if len({row.point.get(key) for row in rows}) > 1]
    left, right = axes.get_xlim()
    last, scale = -math.inf, figure.dpi / 72
    for row in sorted(rows, key=lambda row: row.loss or 0):
        place = (row.operations or 0, min(row.loss or 0, top))
        _, up = axes.transData.transform(place)
        last = max(up, last + APART * scale)
        leftwards = place[0] > math.sqrt(left * right)
        axes.annotate(
            words({key: row.point[key] for key in keys if key in row.point}),
            place,
            xytext=(-7 if leftwards else 7, (last - up) / scale),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="center",
            fontsize=8.5,
            zorder=4,
        )
