"""The plots of a sweep: loss against learning rate, rows and operations, its curves, parallel coordinates.

Each is a PNG in the sweep's folder, and an SVG on light and on dark paper for its page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from train.sweep.axis import Choices
from train.sweep.parallel_plot import parallel
from train.sweep.pareto_plot import comparable, pareto
from train.sweep.plot_style import (
    DARK,
    DASHES,
    LABELS,
    LIGHT,
    Theme,
    colour,
    limit_losses,
    new_figure,
    render,
    shade,
    top_of,
)
from train.sweep.record import Record
from train.sweep.rows import Row, best_of
from train.sweep.scaling import ScalingCurve
from train.sweep.scaling_plot import scaling
from train.sweep.space import Space, shown

LEGEND = 10
"""Most lines with a name in the legend; more are told apart by colour alone."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure for the page, as SVG."""

    name: str
    caption: str
    light: str
    dark: str
    broad: bool
    """Whether it needs the page's whole width."""


def draw(
    folder: Path, space: Space, rows: Sequence[Row], scaling_curves: Sequence[ScalingCurve] = ()
) -> list[Plot]:
    """The plots that this sweep has data for; their PNGs go to `folder`."""
    if not any(row.loss is not None for row in rows):
        return []
    wanted: list[tuple[str, str, Callable[[Theme], Figure]]] = []
    if any(curve.runs for curve in scaling_curves):
        caption = "Lowest held-out loss against the number of training rows: a dot for each run, the fitted "
        caption += "law with its 95 % interval, and what it predicts for two and four times the largest size"
        wanted.append(("scaling", caption, lambda theme: scaling(scaling_curves, theme)))
    if "lr" in space.axes:
        caption = (
            "Held-out loss against learning rate: a dot for each run, a cross for one that was pruned, a "
        )
        caption += "triangle for one far above; lines through the means of seeds"
        wanted.append(("loss-lr", caption, lambda theme: loss_against_lr(space, rows, theme)))
    caption = "Held-out loss of every run; a cross where one was pruned"
    wanted.append(("curves", caption, lambda theme: curves(rows, theme)))
    if len(space.axes) > 1:
        caption = (
            "A line for each point, from its values to its loss, dotted if none finished; the best is thick"
        )
        wanted.append(("parallel", caption, lambda theme: parallel(space, rows, theme)))
    if comparable(rows) and not scaling_curves:  # whose runs take the same steps
        caption = (
            "Held-out loss against the operations of all steps so far: a thin line for each run, a mark for "
        )
        caption += "each point where its runs ended (the mean of seeds; a bar from the lowest to the highest)"
        wanted.append(("pareto", caption, lambda theme: pareto(rows, theme)))
    plots = []
    for name, caption, figure in wanted:
        partial = folder / f"{name}.png.part"
        light, dark = render(figure, LIGHT, png=partial), render(figure, DARK)
        partial.replace(folder / f"{name}.png")
        broad = name == "parallel" and len(space.axes) > 3
        plots.append(Plot(name, caption, light, dark, broad))
    return plots


def loss_against_lr(space: Space, rows: Sequence[Row], theme: Theme) -> Figure:
    """A line, by colour and dash, for each combination of the other values, or of the first keys with few."""
    known = [row for row in rows if row.loss is not None]
    others = [key for key in space.axes if key != "lr"]
    named = [key for key in others if isinstance(space.axes[key], Choices)]
    while len({_named(row, named) for row in known}) > LEGEND:
        named.pop()
    lines: dict[str, list[Row]] = {}
    for row in known:
        lines.setdefault(_named(row, named), []).append(row)
    figure, axes = new_figure()
    losses = [record.loss for row in rows for record in row.records if record.loss is not None]
    top = top_of(losses)
    connected = named == others and len(known) > len(lines)  # by learning rates tried with the same others
    for k, (name, same) in enumerate(sorted(lines.items())):
        style = {"color": colour(theme, k), "linestyle": DASHES[k % len(DASHES)]}
        same = sorted(same, key=_lr)
        if connected:
            means = [(_lr(row), row.loss) for row in same if row.state == "finished"]
            if means:
                axes.plot(*zip(*means, strict=True), **style, linewidth=1.4, zorder=1)
        for kind, marker in (("finished", "o"), ("pruned", "x")):
            dots = [
                (_lr(row), min(record.loss, top), record.loss > top)
                for row in same
                for record in row.records
                if record.state == kind and record.loss is not None
            ]
            for beyond in (False, True):
                chosen = [(x, y) for x, y, over in dots if over == beyond]
                if chosen:
                    axes.scatter(
                        *zip(*chosen, strict=True),
                        color=style["color"],
                        marker="^" if beyond else marker,
                        s=26,
                        zorder=2,
                    )
        axes.plot(
            [], [], marker="o", **(style if connected else {**style, "linestyle": ""}), label=name or "all"
        )
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
    limit_losses(axes, losses, top)
    axes.set(xlabel="learning rate", ylabel="held-out loss (nats per answer token)")
    axes.grid(linewidth=0.5)
    return figure


def curves(rows: Sequence[Row], theme: Theme) -> Figure:
    """A line for each run, coloured by its loss at the end; of few runs, dashed in turn."""
    best = best_of(rows)
    drawn = [(record, line) for row in rows for record in row.records if (line := record.curve)]
    later = [loss for _, line in drawn for step, loss in line if step > 0]
    losses = later or [loss for _, line in drawn for _, loss in line]
    figure, axes = new_figure()
    if not losses:
        return figure
    top = top_of(losses)
    ranks = sorted(range(len(drawn)), key=lambda k: _at_the_end(drawn[k][0]))
    few = len(drawn) <= LEGEND
    for rank, k in reversed(list(enumerate(ranks))):
        record, line = drawn[k]
        share = rank / max(1, len(drawn) - 1)
        ink = theme["best"] if record == best else shade(theme, share)
        if record.state == "failed":
            ink = theme["line"]
        axes.plot(
            *zip(*line, strict=True),
            color=ink,
            linestyle=DASHES[rank % len(DASHES)] if few else "-",
            linewidth=2.4 if record == best else 1.3,
            alpha=1.0 if few or record == best else 0.7,
            marker="." if len(line) == 1 else None,
            zorder=3 if record == best else 2,
            label=", ".join(map(shown, record.point.values())) if few or record == best else None,
        )
        if record.state == "pruned":
            axes.plot(*line[-1], marker="x", color=ink, markersize=6, zorder=2)
    handles, labels = axes.get_legend_handles_labels()
    if handles and len(drawn) > 1:  # in the order of their losses
        place = "outside right upper" if few else "outside upper right"
        figure.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8.5, loc=place)
    axes.set(xlabel="step", ylabel="held-out loss (nats per answer token)")
    limit_losses(axes, losses, top)
    axes.set_xlim(left=0)
    axes.grid(linewidth=0.5)
    return figure


def _at_the_end(record: Record) -> float:
    return math.inf if record.loss is None else record.loss


def _named(row: Row, keys: Sequence[str]) -> str:
    return ", ".join(shown(row.point[key]) for key in keys)


def _lr(row: Row) -> float:
    return float(row.point["lr"])
