"""`train run`: one run, or several that share every pass through the language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

from llava_core.cli.console import human_bytes, say
from llava_core.device import free_memory
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.projector.projector import require_tokens
from llava_core.registry import PROJECTORS
from llava_core.types import JsonDict
from train.config import ALL_ROWS, RunConfig
from train.cost_prediction import run as plan
from train.distributed import joined
from train.initialization import projector_of
from train.loop import EndCallback, EvalCallback, Outcome, Trainer
from train.resources import TrainingResources
from train.run_folder import RunFolder, as_begun
from train.stop_signal import StopRequest
from train.training_run import TrainingRun

PER_RUN_KEYS = frozenset(
    (
        *("out", "projector", "visual_tokens", "start", "optimizer", "lr", "weight_decay", "warmup"),
        *("feature_norm", "decay", "init", "keep", "eval_captions", "json"),
    )
)
"""Flags in which runs that train together may differ."""


def run(config: RunConfig) -> JsonDict:
    """Train a projector, or continue the run that OUT holds; returns the figures of the last checkpoint."""
    if config.dry_run:
        return plan(config)
    with joined() as group:
        with group.same_outcome():
            resources = TrainingResources(config, group)
        (outcome,) = train([config], resources)
        if isinstance(outcome, LlavaError):
            group.fail_all(outcome)
        return outcome


def train(
    configs: Sequence[RunConfig],
    resources: TrainingResources,
    on_eval: EvalCallback | None = None,
    names: Sequence[str] = (),
    stop: StopRequest | None = None,
    on_end: EndCallback | None = None,
) -> list[Outcome]:
    """Train these runs together: each step is one pass of all their samples through the language model.

    They have the same samples in the same order, so they may differ in what concerns the projector alone
    (PER_RUN_KEYS). Each has a folder of its own and continues from there. Returns each run's summary, with
    `pruned` where `on_eval` ended it, or the error it failed with while the others went on. `names` are what
    metric writers call the runs, by default their folders'. `stop` tells of a signal that came after their
    last step, too, and `on_end` adds to their summaries.
    """
    configs = [as_begun(config) for config in configs]
    resources.use(configs[0])
    outcomes: dict[int, Outcome] = {}
    runs: dict[int, TrainingRun] = {}
    with ExitStack() as stack:
        for number, config in enumerate(configs):
            try:
                with resources.group.same_outcome():
                    require_same_steps(configs[0], config)
                    folder = RunFolder(config.out, config)
                    if (finished := finished_before(folder, resources)) is not None:
                        outcomes[number] = finished
                        continue
                    if resources.group.main:
                        stack.enter_context(Lock(config.out))
                    title = f"{config.out.name}: " if len(configs) > 1 else ""
                    name = names[number] if names else None
                    runs[number] = TrainingRun(config, folder, resources, title, name)
            except LlavaError as error:  # of one rank, perhaps of another
                outcomes[number] = error
                runs.pop(number, None)
        for run in runs.values():
            stack.callback(run.writers.close)
            run.begin()
        if runs:
            stop = stack.enter_context(StopRequest() if stop is None else stop)
            outcomes |= train_to_the_end(runs, resources, stop, on_eval, on_end)
    return [outcomes[number] for number in range(len(configs))]


def train_to_the_end(
    runs: dict[int, TrainingRun],
    resources: TrainingResources,
    stop: StopRequest,
    on_eval: EvalCallback | None,
    on_end: EndCallback | None = None,
) -> dict[int, Outcome]:
    """The outcomes of all runs; those that a kill left behind the others catch up with them first."""
    outcomes: dict[int, Outcome] = {}
    first = next(iter(runs.values()))
    tokens = sum(run.prediction.tokens_per_step for run in runs.values())
    most = min(run.prediction.micro_tokens for run in runs.values())
    if most < min(first.config.micro_tokens, tokens):
        say(f"--micro-tokens {most}, since {human_bytes(free_memory(resources.device))} are free")
    packing = resources.packing(first.config.micro_tokens, most)
    while left := {number: run for number, run in runs.items() if number not in outcomes}:
        step, *later = sorted({run.step for run in left.values()})
        behind = {number: run for number, run in left.items() if run.step == step}
        until = later[0] if later else first.schedule.steps
        outcomes |= Trainer(behind, resources, packing, stop, on_eval, on_end).train(until)
    return outcomes


def finished_before(folder: RunFolder, resources: TrainingResources) -> JsonDict | None:
    """The summary of a finished run. Raises LlavaError if it cannot be the same run, or cannot be trained."""
    config, shard = folder.config, resources.shards[0]
    fusion = shard.identity.fusion
    require_tokens(config.projector, config.visual_tokens, shard.tokens, fusion)  # or refuse, with no model
    if PROJECTORS.stem(config.projector) is None:
        projector_of(config, shard, resources.llm.hidden)  # or refuse
    finished = folder.finished()
    if finished is not None:
        if folder.moved or config.rows != ALL_ROWS:
            folder.resume(resources.provenance, resources.rows(config))  # or refuse
        say(f"{config.out} is finished; nothing to do")
    return finished


def require_same_steps(first: RunConfig, other: RunConfig) -> None:
    """Raise LlavaError unless two runs see the same samples in the same steps, and one language model."""
    if first is not other and first.tune != "projector":
        raise LlavaError("runs that train together need --tune projector", got=first.tune)
    for field in dataclasses.fields(first):
        mine, others = getattr(first, field.name), getattr(other, field.name)
        if field.name not in PER_RUN_KEYS and mine != others:
            raise LlavaError(
                f"runs that train together need one --{field.name.replace('_', '-')}",
                expected=mine,
                got=others,
            )
