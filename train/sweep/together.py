"""How many trials train together: the number of --together, or for `auto` the fastest by measurement."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from llava_core.cli.console import say
from llava_core.device import default_dtype, free_memory, is_memory_full
from llava_core.projector.projector import parameter_count
from train.config import RunConfig
from train.cost_prediction import activation_bytes
from train.data.batch import Batch
from train.data.feature_cache import AUTO_SHARE
from train.data.packing import tokens_of
from train.data.schedule import Schedule
from train.initialization import projector_of
from train.model.loss import packed_losses
from train.resources import TrainingResources
from train.sweep.budget import Budget
from train.sweep.config import SweepConfig
from train.sweep.space import Space
from train.sweep.trial_steps import shareable_keys

WORTH = 1.1
"""Twice as many together must be faster by this factor: less may be noise, and takes memory."""
PASSES = 5
"""Passes of either number, of which the fastest counts, after one that warms up."""


def why_alone(config: SweepConfig, space: Space) -> str:
    """Why --together does nothing, or `auto` is 1 without a measurement; "" if neither."""
    if config.together == 1:
        return ""
    if config.tune != "projector":
        return "--together does nothing here: each trial has a language model of its own"
    if not shareable_keys(config) & space.axes.keys():
        costs = " or costs" if config.budget and Budget.of(config.budget).by_cost else ""
        return f"--together does nothing here: {', '.join(space.keys)} changes what a step reads{costs}"
    if config.together == "auto" and (config.prune == "median" or not space.is_grid):
        what = "values are drawn and trials pruned by those that ended before, however fast the machine is"
        return f"--together auto trains one by one here: {what}; or give a number"
    return ""


def fastest(gain: Callable[[int, int], float], most: int) -> tuple[int, float]:
    """(number of trials together, up to `most`; how many times as fast as one by one).

    `gain` measures how many times as fast a number is as a smaller one; it is asked for twice as many trials
    until that is less than WORTH.
    """
    number, times = 1, 1.0
    while number < most and (faster := gain(number, min(2 * number, most))) >= WORTH:
        number, times = min(2 * number, most), times * faster
    return number, times


def measured(config: RunConfig, resources: TrainingResources, most: int) -> int:
    """The fastest number of runs like `config` to train together, up to `most`."""
    number, gain = fastest(Step(config, resources).gain, most)
    how = f"{gain:.1f} times as fast as one by one" if number > 1 else "more at a time gain nothing"
    say(f"trains {number} {'trial' if number == 1 else 'trials'} at a time, as measured here: {how}")
    return number


class Step:
    """The first step of runs like `config`, forward and backward, with a projector that is thrown away."""

    def __init__(self, config: RunConfig, resources: TrainingResources) -> None:
        self.config = config = dataclasses.replace(config, tune="projector")  # others have a model each
        self.resources = resources
        resources.tune(config)
        samples, _ = resources.samples(config)
        epochs, indices = Schedule.of(config, samples.sizes).at(0)
        self.batch: Batch = samples.batch(indices, epochs)
        projector = projector_of(config, resources.shards[0], resources.llm.hidden)
        self.projector = projector.to(resources.device)
        self.visual = projector.tokens_out(samples.tokens)
        self.tokens = sum(tokens_of(example, self.visual) for example in self.batch.examples)

    def gain(self, few: int, more: int) -> float:
        """How many times as many samples/s `more` runs in one pass make as `few`, measured in turns.

        0 if --micro-tokens or memory do not allow it.
        """
        room = AUTO_SHARE * free_memory(self.resources.device)
        if more * self.tokens > self.config.micro_tokens or self.bytes(more) > room:
            return 0.0
        try:
            passes = [(self.seconds(few), self.seconds(more)) for _ in range(1 + PASSES)][1:]
        except RuntimeError as error:
            if not is_memory_full(error):
                raise
            if self.resources.device.type == "cuda":
                torch.cuda.empty_cache()
            return 0.0
        return (more / few) * min(short for short, _ in passes) / min(long for _, long in passes)

    def seconds(self, runs: int) -> float:
        """Seconds of one pass."""
        llm, visual = self.resources.llm, [self.visual] * runs
        packing = self.resources.packing(self.config.micro_tokens)
        began = time.perf_counter()
        for row in packing.rows(self.batch.to(llm.device), visual):
            torch.stack(packed_losses(llm, [self.projector] * runs, row)).sum().backward()  # type: ignore[no-untyped-call]
        if llm.device.type == "cuda":
            torch.cuda.synchronize(llm.device)
        seconds = time.perf_counter() - began
        self.projector.zero_grad()
        return seconds

    def bytes(self, runs: int) -> int:
        """Memory for as many runs, as `train plan` predicts it: activations, projectors and optimizers."""
        llm, config = self.resources.llm, self.config
        dtype, recomputes = default_dtype(llm.device), config.gradient_checkpointing
        activations = self.tokens * activation_bytes(llm.model.config, dtype, recomputes=recomputes)
        return runs * (activations + 16 * parameter_count(self.projector))
