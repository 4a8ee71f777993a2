"""How many steps `--budget` gives each trial: fixed when the first trial of its kind starts, and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.types import JsonDict
from train.config import RunConfig
from train.cost_prediction import COSTLESS, forecast
from train.data.schedule import Schedule
from train.resources import TrainingResources
from train.run import PER_RUN_KEYS, train
from train.sweep.budget import Budget
from train.sweep.config import SweepConfig
from train.sweep.space import Point, Space, data_configs, run_config, words

if TYPE_CHECKING:
    from train.sweep.study import Study  # needs the extra

TIMED = 8
"""Steps of a run by which its time is measured, after as many that warm up."""


def shareable_keys(config: SweepConfig) -> frozenset[str]:
    """Flags in which trials that train together may differ: by a budget of operations or time, only those
    that leave the number of steps as it is."""
    by_cost = config.budget is not None and Budget.of(config.budget).by_cost
    return PER_RUN_KEYS & COSTLESS if by_cost else PER_RUN_KEYS


def with_steps(
    config: RunConfig,
    budget: Budget,
    outline: TrainingResources,
    title: str = "",
    steps_per_s: float | None = None,
) -> RunConfig:
    """`config` with the steps that the budget buys; seconds at the predicted rate unless one is given.

    Raises LlavaError, naming `title`, if they are less than one, which a predicted rate is too rough to tell.
    """
    steps = budget.amount
    if budget.by_cost:
        predicted = forecast(config, outline, measure_for=0.3)
        if budget.unit == "flops":
            steps, one = steps / predicted.operations_per_step, predicted.operations_per_step
        elif steps_per_s is not None:
            steps, one = steps * steps_per_s, 1 / steps_per_s
        else:
            steps, one = max(1.0, steps * predicted.steps_per_s), 0.0
        if steps < 1:
            digit = 10.0 ** (math.floor(math.log10(one)) - 3)
            enough = Budget(budget.unit, float(f"{math.ceil(one / digit) * digit:.4g}"))
            what = "--budget buys less than one step" + (f" of {title}" if title else "")
            raise LlavaError(what, expected=f"{enough} or more", got=str(budget), exit_code=2)
    whole, sizes = int(steps), outline.samples(config)[0].sizes
    epochs = -(-whole // Schedule.of(config, sizes).steps_per_epoch)
    return dataclasses.replace(config, max_steps=whole, epochs=epochs)


class TrialSteps:
    """The flags of trials, with the steps of --budget if there is one.

    Trials that differ in COSTLESS flags and the seed alone are of one kind, and get the same number.
    """

    def __init__(self, config: SweepConfig, space: Space, study: Study) -> None:
        self.config, self.space, self.study = config, space, study
        self.budget = None if config.budget is None else Budget.of(config.budget)

    @functools.cached_property
    def outline(self) -> TrainingResources:
        """Resources without weights: a prediction leaves the trials' language model as it is."""
        return TrainingResources(data_configs(self.config, self.space)[0], weights=False)

    def run_config(self, point: Point, folder: Path, resources: TrainingResources | None = None) -> RunConfig:
        """The flags of the trial at `point`; `resources` where it may be the first of its kind.

        Raises LlavaError if the budget buys it less than one step.
        """
        config = run_config(self.config, point, folder)
        if self.budget is None:
            return config
        kind = json.dumps({key: point[key] for key in sorted(point) if key not in COSTLESS | {"seed"}})
        steps = self.study.steps_of(kind)
        if steps is None:
            assert resources is not None
            steps = self.study.fix_steps(kind, begun_with(folder) or self._bought(config, point, resources))
        return dataclasses.replace(config, **steps)

    def _bought(self, config: RunConfig, point: Point, resources: TrainingResources) -> JsonDict:
        assert self.budget is not None
        title, rate = f"trial {int(config.out.name)} ({words(point)})", None
        if self.budget.unit == "seconds":
            rate = measured_rate(config, resources)
        config = with_steps(config, self.budget, self.outline, title, rate)
        how = f", at {rate:.3g} steps/s as measured here, evaluations left out" if rate else ""
        say(f"{title}: --budget {self.budget} is {config.max_steps:,} steps{how}")
        return {"max_steps": config.max_steps, "epochs": config.epochs}


def begun_with(folder: Path) -> JsonDict | None:
    """The steps of a trial that has begun, from its folder: the study may have been moved away."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        flags = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        return {"max_steps": flags["max_steps"], "epochs": flags["epochs"]}
    return None


def measured_rate(config: RunConfig, resources: TrainingResources) -> float:
    """Steps/s of a run like `config`, measured in a short one that is thrown away; what it prints, too."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        short = dataclasses.replace(
            config,
            out=Path(folder) / "run",
            eval_features=None,
            eval_text=None,
            max_steps=2 * TIMED,
            epochs=2 * TIMED,
            log_every=TIMED,
            start="scale",
            report_to=(),
        )
        (outcome,) = train([short], resources)
        if isinstance(outcome, LlavaError):
            raise outcome
        last = read_json_lines(short.out / "metrics.jsonl")[-1]
    return max(0.01, float(last["samples_per_s"])) / config.batch_size  # it is rounded to that
