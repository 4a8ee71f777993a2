"""The same sweep for Weights & Biases: its server hands out the points, `wandb agent` runs them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml

from llava_core.cli.console import say
from llava_core.filesystem import replace_text
from llava_core.types import JsonDict
from train.config import RunConfig, SweepConfig
from train.sweep.results import NOT_KEPT
from train.sweep.space import Choices, Range, Space


def export(config: SweepConfig, space: Space, path: Path) -> JsonDict:
    """Write the file; returns what it holds. Every run gets a folder of its own in OUT."""
    axes = {**space.axes, **({"seed": Choices(space.seeds)} if space.seeds else {})}
    flags: list[str] = []
    for field in dataclasses.fields(RunConfig):
        value = getattr(config, field.name)
        if field.name not in {*NOT_KEPT, *axes, "report_to"} and value != field.default:
            flags += [f"--{field.name.replace('_', '-')}", str(value)]
    out = f'{shlex.quote(str(config.out))}/"$WANDB_RUN_ID"'
    # The agent puts a run's id into its environment only, so a shell reads it.
    line = f'exec python -m train run {shlex.join(flags)} --report-to wandb --out {out} "$@"'
    sweep: dict[str, Any] = {
        "name": config.out.name,
        "project": "llava-align",
        "program": "train",
        "method": "bayes" if not space.is_grid else "random" if config.trials else "grid",
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {key: _parameter(axis) for key, axis in axes.items()},
        "command": ["${env}", "bash", "-c", line, "train", "${args}"],
    }
    if config.trials is not None:
        sweep["run_cap"] = space.size(config.trials)
    replace_text(path, yaml.safe_dump(sweep, allow_unicode=True, sort_keys=False, width=1000))
    say(f"{path} is written; then: wandb sweep {shlex.quote(str(path))}")
    return {"wandb_sweep": str(path)}


def _parameter(axis: Choices | Range) -> JsonDict:
    if isinstance(axis, Choices):
        return {"values": axis.plain()}
    whole = "int_" if isinstance(axis.low, int) else ""
    shape = (
        "q_log_uniform_values"
        if whole and axis.log
        else "log_uniform_values"
        if axis.log
        else f"{whole}uniform"
    )
    return {"distribution": shape, "min": axis.low, "max": axis.high}
