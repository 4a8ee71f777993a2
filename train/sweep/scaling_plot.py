"""Held-out loss against the number of training rows: runs, the fitted law with its interval, predictions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from train.sweep.plot_style import Theme, limit_losses, new_figure, top_of
from train.sweep.scaling import AHEAD, ScalingCurve
from train.sweep.space import words

STEPS = 80
"""Points of a drawn law."""


def scaling(curves: Sequence[ScalingCurve], theme: Theme) -> Figure:
    """A colour for each curve."""
    figure, axes = new_figure()
    sizes = sorted({size for curve in curves for size in curve.losses})
    ahead = sorted({times * curve.law.sizes[-1] for curve in curves if curve.law for times in AHEAD})
    losses = [loss for curve in curves for _, loss in curve.runs]
    axes.set_xscale("log")
    for k, curve in enumerate(curves):
        colour = theme["other"] if len(curves) == 1 else matplotlib.colormaps["tab10"](k % 10)
        own = {"color": colour, "zorder": 3}
        label = words(curve.point) or "a run"
        axes.scatter(*zip(*curve.runs, strict=True), s=22, label=label, **own) if curve.runs else None
        if (law := curve.law) is None:
            continue
        rows = np.geomspace(law.sizes[0], AHEAD[-1] * law.sizes[-1], STEPS)
        middle, low, high = zip(*map(law.loss, rows), strict=True)
        losses += [low[-1], middle[-1], min(high[-1], middle[0])]
        axes.fill_between(rows, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)
        measured = rows <= law.sizes[-1]
        law_label = "the law, and its 95 % interval" if len(curves) == 1 else None
        axes.plot(
            rows[measured], np.array(middle)[measured], color=colour, linewidth=1.6, zorder=2, label=law_label
        )
        axes.plot(rows[~measured], np.array(middle)[~measured], "--", color=colour, linewidth=1.6, zorder=2)
        for times in AHEAD:
            at, (loss, *_) = times * law.sizes[-1], law.loss(times * law.sizes[-1])
            hollow = {"facecolors": theme["paper"], "edgecolors": theme["best"], "marker": "D", "zorder": 4}
            predicted = "predicted" if k == 0 and times == AHEAD[0] else None
            axes.scatter([at], [loss], s=30, linewidths=1.4, label=predicted, **hollow)
    ticks = [*sizes, *ahead]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="training rows", ylabel="lowest held-out loss (nats per answer token)")
    limit_losses(axes, losses, top_of(losses))
    axes.grid(linewidth=0.5)
    figure.legend(frameon=False, fontsize=9, loc="outside upper right", ncols=3)
    return figure
