"""Parallel coordinates: a line for each point of a sweep, from its values to its loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from train.sweep.axis import Choices, Range
from train.sweep.plot_style import LABELS, Theme, new_figure, shade, top_of
from train.sweep.rows import Row
from train.sweep.space import Space, shown


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps a key's values to heights from 0 to 1."""

    low: float
    high: float
    log: bool
    values: tuple[Any, ...] | None
    """The values of a list, which lie evenly spaced."""

    @staticmethod
    def of(axis: Choices | Range) -> Scale:
        if isinstance(axis, Range):
            return Scale(axis.low, axis.high, axis.log, None)
        names = any(isinstance(value, str) for value in axis.values)
        return Scale(0, 1, False, axis.values if names else tuple(sorted(axis.values)))

    def at(self, value: Any) -> float:
        if self.values is not None:
            return self.values.index(value) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))

    def ticks(self) -> list[tuple[float, str]]:
        if self.values is not None:
            step = max(1, math.ceil(len(self.values) / LABELS))
            return [(self.at(value), shown(value)) for value in self.values[::step]]
        ends = [self.low, self.high]
        middle = math.sqrt(self.low * self.high) if self.log else sum(ends) / 2
        return [(self.at(value), f"{value:.3g}") for value in (self.low, middle, self.high)]


def parallel(space: Space, rows: Sequence[Row], theme: Theme) -> Figure:
    """An axis for each key and one for the loss."""
    known = [row for row in rows if row.loss is not None]
    losses = [row.loss for row in known if row.loss is not None]
    top = top_of(losses)
    scales = [Scale.of(axis) for axis in space.axes.values()]
    low = min(losses)
    scales.append(Scale(low, max(top, low + 1e-9), False, None))
    names = [*space.axes, "held-out loss"]
    figure, axes = new_figure(max(5.5, 1.9 * len(names)))
    for row in reversed(known):  # the best on top
        values = [*(row.point[key] for key in space.axes), min(row.loss or 0.0, top)]
        heights = [scale.at(value) for scale, value in zip(scales, values, strict=True)]
        best = row is rows[0]
        share = scales[-1].at(values[-1])
        axes.plot(
            range(len(names)),
            heights,
            color=theme["best"] if best else shade(theme, share),
            linewidth=2.6 if best else 1.1,
            alpha=1.0 if best else 0.75,
            linestyle="-" if row.state == "finished" else ":",
            zorder=3 if best else 2,
        )
    for k, scale in enumerate(scales):
        axes.axvline(k, color=theme["ink"], linewidth=0.8, zorder=1)
        for height, label in scale.ticks():
            if k == len(space.axes) and height == 1 and top < max(losses):
                label = f"≥ {label}"
            axes.annotate(
                label,
                (k, height),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                bbox={
                    "boxstyle": "round,pad=0.15",
                    "facecolor": theme["paper"],
                    "edgecolor": "none",
                    "alpha": 0.8,
                },
                zorder=4,
            )
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xlim(-0.25, len(names) - 0.35)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.tick_params(axis="x", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure
