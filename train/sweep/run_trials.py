"""Claim trials, train them, log and save the results."""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Iterator, Sequence

import torch

from llava_core.bootstrap import with_interval
from llava_core.cli.console import counted, say, say_fault, show
from llava_core.cli.translation import translated
from llava_core.errors import FULL, LlavaError, first_line
from llava_core.input_folders import folders_of
from llava_core.types import JsonDict
from train.config import RunConfig
from train.flags import FREE_KEYS
from train.resources import TrainingResources
from train.run import PER_RUN_KEYS, train
from train.run_folder import RunFolder, weights_sha256
from train.stop_signal import StopRequest
from train.sweep.choices import forced_choice
from train.sweep.claim import Claim
from train.sweep.config import ScalingConfig, SweepConfig
from train.sweep.page import write_page
from train.sweep.plots import draw
from train.sweep.results import text_table, write_best, write_results
from train.sweep.rows import best_of, how_sure, rows_of
from train.sweep.scaling import curves_of, figures_of, sentences, text_of
from train.sweep.space import CACHE_KEYS, Point, Space, data_configs, run_config, words
from train.sweep.study import Study
from train.sweep.together import measured, why_alone
from train.sweep.trial_steps import TrialSteps, shareable_keys
from train.training_run import TrainingRun


def open_study(config: SweepConfig, space: Space) -> Study:
    """The study in OUT. Raises LlavaError if that folder holds another."""
    own = run_config(config, {}, config.out)
    flags = {"budget": config.budget, "choices": config.choices} | {
        key: value
        for key, value in RunFolder(config.out, own).training.items()
        if key not in FREE_KEYS and key not in space.keys
    }
    return Study(config, space, flags)


def work(config: SweepConfig, space: Space) -> None:
    """Run trials until none is left that nobody works on; other processes may do the same."""
    study, resources = open_study(config, space), None
    steps = TrialSteps(config, space, study)
    may_share = functools.partial(can_share_step, differing=shareable_keys(config))
    if study.moved:
        resources = opened(config, study)
    together = 1 if config.together == "auto" or config.tune != "projector" else config.together
    free = study.left() - study.running()
    if config.together == "auto" and free > 1 and not why_alone(config, space):
        resources = resources or opened(config, study)
        typical = run_config(config, next(space.typical()), config.out)
        together = measured(typical, resources, -(-free // (config.ray_workers or 1)))
    while claims := study.claim(together, may_share):
        with contextlib.ExitStack() as stack:
            for claim in claims:
                stack.enter_context(claim)
            with no_death_counted(claims):
                resources = resources or opened(config, study)
            while claims:
                group = [claim for claim in claims if may_share(claim.point, claims[0].point)]
                claims = [claim for claim in claims if claim not in group]
                with no_death_counted(claims):
                    run_claims(steps, resources, group)
        with study.lock:
            write_results(config.out, study.records(), space.keys)


@contextlib.contextmanager
def no_death_counted(claims: Sequence[Claim]) -> Iterator[None]:
    """An exception, unlike a kill, is no death of these trials' process."""
    try:
        yield
    except BaseException:
        for claim in claims:
            claim.alive()
        raise


def opened(config: SweepConfig, study: Study) -> TrainingResources:
    """The resources of all trials. Raises LlavaError if their data has changed since the sweep began."""
    configs = data_configs(config, study.space)
    resources = TrainingResources(configs[0], repeated=True)
    data: JsonDict = {"the projector of --init": weights_sha256(config.init)} if config.init else {}
    for own in configs:
        data |= data_of(own, resources, study.space)
    resources.cache_features(configs[0])
    study.require_same_data(data, resources.llm.identity)
    return resources


def data_of(config: RunConfig, resources: TrainingResources, space: Space) -> JsonDict:
    """Identities of the data that trials read, by names for messages, with what of `space` they are of."""
    rows, varied = resources.rows(config), [key for key in space.data_keys if space.axes[key].count != 1]
    of = [f"--{key} {getattr(config, key)}" for key in varied if key not in CACHE_KEYS]
    if set(varied) & set(CACHE_KEYS):
        kind = "" if config.fuse is None else f", fused by {config.fuse}"
        of.insert(0, f"{' + '.join(map(str, folders_of(config.features)))}{kind}")
    named = f" of {', '.join(of)}" if of else ""
    return {
        f"the training rows{named}": rows["samples"],
        f"the held-out rows{named}": rows["held_out"],
        f"the encoder{named}": resources.provenance.encoder.fingerprint,
    }


def can_share_step(one: Point, other: Point, differing: frozenset[str] = PER_RUN_KEYS) -> bool:
    """Whether runs at these points may train together: each has one language model, which they share."""
    alike = all(one.get(key) == other.get(key) for key in {*one, *other} - differing)
    return one == other or (alike and one.get("tune", "projector") == "projector")


def run_claims(steps: TrialSteps, resources: TrainingResources, claims: Sequence[Claim]) -> None:
    """Train these trials together; record in the study how each ended.

    Raises KeyboardInterrupt then if a signal has asked to stop, even after their last step.
    """
    for claim in claims:
        say(f"{claim.title}: {'goes on' if claim.taken_over else 'begins'}")
    names = [f"{steps.config.out.name} {words(claim.point)}" for claim in claims]

    def on_eval(index: int, step: int, figures: JsonDict) -> bool:
        return claims[index].goes_on(step, figures["eval_loss"])

    def on_end(run: TrainingRun) -> JsonDict:
        figures: JsonDict = {
            "tokens_per_picture": run.visual,
            "trained_parameters": run.prediction.trained_parameters,
            "operations": run.prediction.operations_per_step * run.step,
        }
        choices = steps.config.choices
        return figures | ({} if choices is None else forced_choice(run, choices, stop))

    began = time.monotonic()
    outcomes: list[JsonDict | LlavaError] = []
    reason, stop = "", StopRequest()
    try:
        with (
            no_death_counted(claims),
            contextlib.redirect_stdout(io.StringIO()),
        ):  # the table holds the same figures
            configs = [steps.run_config(claim.point, claim.folder, resources) for claim in claims]
            outcomes = train(configs, resources, on_eval, names, stop, on_end)
    except Exception as error:  # the GPU's memory, among others
        if isinstance(error, OSError) and error.errno in FULL:  # no other trial would fare better
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed = as_failure(error)
        outcomes = [failed] if len(claims) == 1 else []
        reason = str(failed)
    finally:
        for claim in claims:
            claim.spent((time.monotonic() - began) / len(claims))
    if not outcomes and not stop.received:
        say(f"{counted(len(claims), 'trial')} cannot train together ({reason}); now one by one")
        for claim in claims:
            run_claims(steps, resources, [claim])
    for claim, outcome in zip(claims, outcomes, strict=False):
        if isinstance(outcome, LlavaError):
            claim.failed(str(outcome))
            say(f"{claim.title}: failed: {outcome}")
            continue
        claim.ended(outcome)
        pruned = f", pruned at step {outcome['pruned']}" if "pruned" in outcome else ""
        say(f"{claim.title}: held-out loss {with_interval(outcome, 'eval_loss')}{pruned}")
    if stop.received:
        raise KeyboardInterrupt


def as_failure(error: Exception) -> LlavaError:
    """The error as the study records it; the traceback of an unforeseen one is printed."""
    if isinstance(error, LlavaError):
        return error
    if isinstance(error, (RuntimeError, OSError)):
        return LlavaError(first_line(error))
    say_fault(error)
    return LlavaError(f"{type(error).__name__}: {first_line(error)}")


def conclude(config: SweepConfig, space: Space) -> JsonDict:
    """Write the table, the plots and the page; print the table and how to make the best run again."""
    study = open_study(config, space)
    steps = TrialSteps(config, space, study)
    with study.lock:  # one process at a time
        records = study.records()
        rows = rows_of(records)
        write_results(config.out, records, space.keys)
        best = best_of(rows)
        command = write_best(config.out, best, steps.run_config(best.point, best.folder)) if best else None
        curves = curves_of(rows) if isinstance(config, ScalingConfig) else []
        plots = draw(config.out, space, rows, curves)
        write_page(config, space, rows, plots, command, curves)
    show(text_table(rows))
    states = [record.state for record in records]
    figures: JsonDict = {
        state: states.count(state) for state in ("finished", "pruned", "failed", "running", "interrupted")
    }
    if running := figures["running"]:
        say(f"{counted(running, 'trial')} still run in other processes; the last to end completes the table")
    if failed := figures["failed"]:
        say(f"{counted(failed, 'trial')} failed; --retry-failed tries again")
    if best is None or command is None:
        errors = [record.error for record in records if record.error]
        if errors and not running:
            got = f"{counted(len(errors), 'failure')}, the last: {errors[-1]}"
            raise LlavaError("no trial finished", got=got)
        return figures
    if sure := how_sure(rows):
        say(sure)
    for curve in curves:
        show(f"\n{text_of(curve)}")
        for line in sentences(curve):
            say(" ".join([*[f"{words(curve.point)}:"] * bool(curve.point), line]))
    if curves:
        figures["laws"] = list(map(figures_of, curves))
    show(translated(f"\nthe best again: {command}"))
    link = config.out / "best"
    kept = f"{link} is" if link.exists() else f"{best.folder} is gone, and with it"
    say(f"{config.out / 'index.html'} shows all; {kept} the best checkpoint")
    gap = best.summary.get("eval_grounding_gap")
    return {
        **figures,
        "best": {"trial": best.number, **best.point},
        "eval_loss": best.loss,
        "eval_grounding_gap": gap,
        "command": command,
    }
