"""Draws the pictures of docs/learn/curves.md: python -m benchmarks.curves --demo demo-out --out DIR

DEMO is a folder that `llava demo` has filled. Trains a few short runs on its features, each in a
folder under OUT (one that is finished is not trained again), and draws their metrics into docs/images/.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from llava_align.config import MODELS
from llava_core.cli.console import table
from llava_core.filesystem import read_json_lines
from train.config import RunConfig
from train.recipes import RECIPES
from train.run import run
from train.sweep.plot_style import OKABE_ITO

STEPS, EVERY, HELD_OUT = 150, 10, 64
COURSE = RECIPES["course"]
RUNS: dict[str, dict[str, Any]] = {
    "course": COURSE,
    "fast": RECIPES["fast"],
    "course, lr 2e-4": {**COURSE, "lr": 2e-4},
    "course, lr 2e-2": {**COURSE, "lr": 2e-2},
    "course, lr 1": {**COURSE, "lr": 1.0},
    "course, seed 1": {**COURSE, "seed": 1},
    "course, seed 2": {**COURSE, "seed": 2},
    "48 pictures, 50 times": {**COURSE, "projector": "mlp", "max_samples": 48, "epochs": 50},
}
BLUE, RED, GREEN, PINK, *_ = OKABE_ITO
Line = list[tuple[int, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    runs = {name: trained(name, flags, given.demo, given.out) for name, flags in RUNS.items()}
    rows = [[name, *(f"{at(curves, step):.3f}" for step in (0, 10, 30, 50, 100, STEPS)),
             f"{curves['eval_grounding_gap'][-1][1]:.3f}"] for name, curves in runs.items()]  # fmt: skip
    print(table(rows, ("held-out loss after", "0", "10", "30", "50", "100", f"{STEPS} steps", "gap")))
    for name, figure in (("gap", gap), ("rates", rates), ("few", few)):
        drawn = figure(runs)
        drawn.savefig(given.pictures / f"curves-{name}.png", dpi=110)
        plt.close(drawn)


def trained(name: str, flags: dict[str, Any], demo: Path, out: Path) -> dict[str, Line]:
    """The metrics of a run by their names: (step, value) of each line."""
    folder = out / name.replace(" ", "-").replace(",", "")
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "eval_every": EVERY,
        "eval_samples": HELD_OUT,
        "eval_captions": 0,
        **flags,
    }
    settings |= {"features": demo / "features/train", "eval_features": demo / "features/held-out"}
    run(RunConfig(llm=MODELS / "llm", out=folder, log_every=5, device="cpu", **settings))
    curves: dict[str, Line] = {}
    for metrics in read_json_lines(folder / "metrics.jsonl"):
        for key, value in metrics.items():
            curves.setdefault(key, []).append((metrics["step"], value))
    return curves


def at(curves: dict[str, Line], step: int) -> float:
    return dict(curves["eval_loss"]).get(step, math.nan)


def gap(runs: dict[str, dict[str, Line]]) -> Any:
    """Loss above, grounding gap below, of both recipes."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    for name, colour, style in (("course", BLUE, "-"), ("fast", RED, "--")):
        draw(above, runs[name]["eval_loss"], name, colour, style)
        draw(below, runs[name]["eval_grounding_gap"], name, colour, style)
    above.set(ylabel="held-out loss\n(nats per answer token)", ylim=(0, 3))
    below.set(ylabel="grounding gap\n(nats per answer token)", xlabel="step")
    below.axhline(0, color="grey", linewidth=0.8)
    above.legend(frameon=False)
    return figure


def rates(runs: dict[str, dict[str, Line]]) -> Any:
    """Learning rates too low, right and too high; three seeds of the right one."""
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for name, colour, style in (
        ("course, lr 2e-4", BLUE, "--"),
        ("course", GREEN, "-"),
        ("course, lr 2e-2", PINK, "-."),
        ("course, lr 1", RED, (0, (8, 2, 2, 2, 2, 2))),
    ):
        draw(axes, runs[name]["eval_loss"], "course, lr 2e-3" if name == "course" else name, colour, style)
    for name in ("course, seed 1", "course, seed 2"):
        draw(
            axes,
            runs[name]["eval_loss"],
            "the same, other seeds" if name[-1] == "1" else None,
            GREEN,
            ":",
        )
    axes.set(ylabel="held-out loss (nats per answer token)", xlabel="step", ylim=(0, 3))
    axes.legend(frameon=False)
    return figure


def few(runs: dict[str, dict[str, Line]]) -> Any:
    """A run on too few pictures: the loss of a step falls on, the held-out loss does not."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    curves = runs["48 pictures, 50 times"]
    draw(axes, curves["loss"], "loss of a step", BLUE, "--")
    draw(axes, curves["eval_loss"], "held-out loss", RED)
    draw(axes, runs["course"]["eval_loss"], "held-out loss of 2,394 pictures, once", GREEN, ":")
    axes.set(ylabel="nats per answer token", xlabel="step", ylim=(0, 3.5))
    axes.legend(frameon=False)
    return figure


def draw(axes: Axes, line: Line, label: str | None, colour: str, style: Any = "-") -> None:
    steps, values = zip(*line, strict=True)
    axes.plot(steps, values, linestyle=style, color=colour, label=label, linewidth=1.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.3)


if __name__ == "__main__":
    main()
