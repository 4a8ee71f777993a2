"""The pictures of a sweep: loss against learning rate, every curve, and parallel coordinates.

Each is drawn twice: as PNG in the sweep's folder, and as SVG on light and on dark paper for its page.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from llava_core.filesystem import read_json_lines
from train.sweep.results import Row, best_of
from train.sweep.space import Choices, Range, Space, shown
from train.sweep.study import Record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Figure = Any
LEGEND = 10
"""Lines that are named one by one; more are told apart by colour alone."""
LABELS = 8
"""Values of a list that are written beside its axis; of more, as many evenly spread."""
OUTLIER = 4.0
"""Losses so many times further above the best than the median is are drawn at the edge."""
LIGHT = {"paper": "#ffffff", "ink": "#1f1e1b", "line": "#dedad2", "best": "#b4532f"}
DARK = {"paper": "#161614", "ink": "#e9e6df", "line": "#4a4740", "best": "#f0a07c"}
SHADES = {"#ffffff": (0.05, 0.85), "#161614": (0.3, 1.0)}
"""The part of the colour map, from the best loss to the worst, that is seen on each paper."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure for the page, as SVG."""

    name: str
    caption: str
    light: str
    dark: str
    broad: bool
    """Wants the page's whole width."""


def draw(folder: Path, space: Space, rows: Sequence[Row]) -> list[Picture]:
    """Those pictures that the sweep has something for; their PNGs go to `folder`."""
    if not any(row.loss is not None for row in rows):
        return []
    wanted: list[tuple[str, str, Callable[[dict[str, str]], Figure]]] = []
    if "lr" in space.axes:
        caption = (
            "Held-out loss against learning rate: a dot for each run, a cross for one that was pruned, a "
        )
        caption += "triangle for one far above; lines through the means of seeds"
        wanted.append(("loss-lr", caption, lambda theme: loss_against_lr(space, rows)))
    caption = "Held-out loss of every run; a cross where one was pruned"
    wanted.append(("curves", caption, lambda theme: curves(rows, theme)))
    if len(space.axes) > 1:
        caption = (
            "A line for each point, from its values to its loss, dotted if none finished; the best is thick"
        )
        wanted.append(("parallel", caption, lambda theme: parallel(space, rows, theme)))
    pictures = []
    for name, caption, figure in wanted:
        partial = folder / f"{name}.png.part"
        light, dark = _svg(figure, LIGHT, png=partial), _svg(figure, DARK)
        partial.replace(folder / f"{name}.png")
        broad = name == "parallel" and len(space.axes) > 3
        pictures.append(Picture(name, caption, light, dark, broad))
    return pictures


def loss_against_lr(space: Space, rows: Sequence[Row]) -> Figure:
    """One colour for each combination of the other values, or of the first keys that make few enough."""
    known = [row for row in rows if row.loss is not None]
    others = [key for key in space.axes if key != "lr"]
    named = [key for key in others if isinstance(space.axes[key], Choices)]
    while len({_named(row, named) for row in known}) > LEGEND:
        named.pop()
    lines: dict[str, list[Row]] = {}
    for row in known:
        lines.setdefault(_named(row, named), []).append(row)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    losses = [record.loss for row in rows for record in row.records if record.loss is not None]
    top = _top(losses)
    connected = named == others and len(known) > len(lines)  # by learning rates tried with the same others
    for k, (name, members) in enumerate(sorted(lines.items())):
        colour = plt.get_cmap("tab10")(k)
        members = sorted(members, key=_lr)
        if connected:
            means = [(_lr(row), row.loss) for row in members if row.state == "finished"]
            if means:
                axes.plot(*zip(*means, strict=True), color=colour, linewidth=1.4, zorder=1)
        for kind, marker in (("finished", "o"), ("pruned", "x")):
            dots = [
                (_lr(row), min(record.loss, top), record.loss > top)
                for row in members
                for record in row.records
                if record.state == kind and record.loss is not None
            ]
            for beyond in (False, True):
                chosen = [(x, y) for x, y, over in dots if over == beyond]
                if chosen:
                    axes.scatter(
                        *zip(*chosen, strict=True),
                        color=colour,
                        marker="^" if beyond else marker,
                        s=26,
                        zorder=2,
                    )
        axes.plot([], [], "o-" if connected else "o", color=colour, label=name or "all")
    if len(lines) > 1:
        figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    rates = [_lr(row) for row in rows]
    if max(rates) / min(rates) > 3:
        axes.set_xscale("log")
    if isinstance(space.axes["lr"], Choices) and len(set(rates)) <= LABELS:
        ticks = sorted(set(rates))
        axes.set_xticks(ticks, [shown(rate) for rate in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.margins(x=0.08)
    _limit(axes, losses, top)
    axes.set(xlabel="learning rate", ylabel="held-out loss (nats per answer token)")
    axes.grid(linewidth=0.5)
    return figure


def parallel(space: Space, rows: Sequence[Row], theme: dict[str, str]) -> Figure:
    """An axis for each key and one for the loss."""
    known = [row for row in rows if row.loss is not None]
    losses = [row.loss for row in known if row.loss is not None]
    top = _top(losses)
    scales = [_Scale.of(axis) for axis in space.axes.values()]
    low = min(losses)
    scales.append(_Scale(low, max(top, low + 1e-9), False, None))
    names = [*space.axes, "held-out loss"]
    figure, axes = plt.subplots(figsize=(max(5.5, 1.9 * len(names)), 4.2), layout="constrained")
    for row in reversed(known):  # the best on top
        values = [*(row.point[key] for key in space.axes), min(row.loss or 0.0, top)]
        heights = [scale.at(value) for scale, value in zip(scales, values, strict=True)]
        best = row is rows[0]
        share = scales[-1].at(values[-1])
        axes.plot(
            range(len(names)),
            heights,
            color=theme["best"] if best else _shade(theme, share),
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


def curves(rows: Sequence[Row], theme: dict[str, str]) -> Figure:
    """A line for each run, coloured by its loss at the end."""
    best = best_of(rows)
    drawn = [(record, line) for row in rows for record in row.records if (line := curve_of(record))]
    later = [loss for _, line in drawn for step, loss in line if step > 0]
    losses = later or [loss for _, line in drawn for _, loss in line]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if not losses:
        return figure
    top = _top(losses)
    ranks = sorted(range(len(drawn)), key=lambda k: _at_the_end(drawn[k][0]))
    few = len(drawn) <= LEGEND
    for rank, k in reversed(list(enumerate(ranks))):
        record, line = drawn[k]
        share = rank / max(1, len(drawn) - 1)
        colour = theme["best"] if record == best else _shade(theme, share)
        if record.state == "failed":
            colour = theme["line"]
        axes.plot(
            *zip(*line, strict=True),
            color=colour,
            linewidth=2.4 if record == best else 1.1,
            alpha=1.0 if few or record == best else 0.7,
            marker="." if len(line) == 1 else None,
            zorder=3 if record == best else 2,
            label=", ".join(map(shown, record.point.values())) if few or record == best else None,
        )
        if record.state == "pruned":
            axes.plot(*line[-1], marker="x", color=colour, markersize=6, zorder=2)
    handles, labels = axes.get_legend_handles_labels()
    if handles and len(drawn) > 1:  # in the order of their losses
        place = "outside right upper" if few else "outside upper right"
        figure.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8.5, loc=place)
    axes.set(xlabel="step", ylabel="held-out loss (nats per answer token)")
    _limit(axes, losses, top)
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.5)
    return figure


def curve_of(record: Record) -> list[tuple[int, float]]:
    """(step, held-out loss) of each evaluation, from the run's metrics."""
    try:
        metrics = read_json_lines(record.folder / "metrics.jsonl")
    except (OSError, ValueError):
        return []
    losses = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
    return [(step, loss) for step, loss in losses if math.isfinite(loss)]


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Maps a key's values to heights from 0 to 1."""

    low: float
    high: float
    log: bool
    values: tuple[Any, ...] | None
    """Of a list, which lie evenly spaced."""

    @staticmethod
    def of(axis: Choices | Range) -> _Scale:
        if isinstance(axis, Range):
            return _Scale(axis.low, axis.high, axis.log, None)
        names = any(isinstance(value, str) for value in axis.values)
        return _Scale(0, 1, False, axis.values if names else tuple(sorted(axis.values)))

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


def _at_the_end(record: Record) -> float:
    return math.inf if record.loss is None else record.loss


def _named(row: Row, keys: Sequence[str]) -> str:
    return ", ".join(shown(row.point[key]) for key in keys)


def _lr(row: Row) -> float:
    return float(row.point["lr"])


def _top(losses: Sequence[float]) -> float:
    """The highest loss that is drawn to scale: a run that diverged would flatten all others."""
    ordered = sorted(losses)
    low, median = ordered[0], ordered[len(ordered) // 2]
    reach = max(OUTLIER * (median - low), 0.05 * abs(low))
    return min(ordered[-1], low + reach)


def _limit(axes: Any, losses: Sequence[float], top: float) -> None:
    low = min(losses)
    margin = 0.07 * (top - low) or 0.05 * abs(low) or 1.0
    axes.set_ylim(low - margin, top + margin)


def _shade(theme: dict[str, str], share: float) -> Any:
    low, high = SHADES[theme["paper"]]
    return plt.get_cmap("viridis")(low + (high - low) * share)


def _svg(figure: Callable[[dict[str, str]], Figure], theme: dict[str, str], png: Path | None = None) -> str:
    """Draw it on such paper; as a PNG, too, if a path is given."""
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
        made = figure(theme)
        if png:
            made.savefig(png, format="png", dpi=150)
        made.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(made)
    return text.getvalue()
