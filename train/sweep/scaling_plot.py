"""Held-out loss against the number of training rows: runs, the fitted law with its interval, predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from train.sweep.plot_style import MARKERS, Theme, colour, limit_losses, new_figure
from train.sweep.scaling import AHEAD, ScalingCurve
from train.sweep.space import words

STEPS = 80
"""Points of a drawn law."""


def scaling(curves: Sequence[ScalingCurve], theme: Theme) -> Figure:
    """A colour and a mark for each curve."""
    figure, axes = new_figure()
    axes.set_xscale("log")
    losses = [loss for curve in curves for _, loss in curve.runs]
    reach, ticks = 2 * min(losses) - max(losses), {size for curve in curves for size in curve.losses}
    for k, curve in enumerate(curves):
        ink, marker = colour(theme, k), MARKERS[k % len(MARKERS)]
        if curve.runs:
            axes.scatter(*zip(*curve.runs, strict=True), s=22, color=ink, marker=marker, zorder=3)
        axes.plot([], [], "-", marker=marker, color=ink, label=words(curve.point) or "runs and law")
        if (law := curve.law) is None:
            continue
        last, line = law.sizes[-1], {"color": ink, "linewidth": 1.6, "zorder": 2}
        rows = np.union1d(np.geomspace(law.sizes[0], AHEAD[-1] * last, STEPS), [last])
        middle, low, high = map(np.array, zip(*map(law.loss, rows), strict=True))
        axes.fill_between(rows, low, high, color=ink, alpha=0.18, linewidth=0, zorder=1)
        axes.plot(rows[rows <= last], middle[rows <= last], **line)
        axes.plot(rows[rows >= last], middle[rows >= last], "--", **line)
        ahead = [times * last for times in AHEAD]
        predicted = [law.loss(each)[0] for each in ahead]
        axes.plot(ahead, predicted, "D", color=ink, markerfacecolor=theme["paper"], zorder=4)
        losses += [max(low[-1], reach), *predicted]
        ticks |= {*ahead}
    if any(curve.law for curve in curves):
        axes.plot([], [], "D--", color=theme["ink"], markerfacecolor=theme["paper"], label="predicted")
    axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training rows", ylabel="lowest held-out loss (nats per answer token)")
    limit_losses(axes, losses, max(losses))
    axes.grid(linewidth=0.5)
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=3)
    return figure
