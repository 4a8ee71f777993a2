"""A trial while this process works on it: its evaluations, whether to prune it, and how it ended."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path

import optuna
from optuna.trial import TrialState

from llava_core.filesystem import Lock
from llava_core.types import JsonDict
from train.sweep.space import Point, words
from train.sweep.study_folder import quiet

UNPRUNED = 5
"""Trials that it is compared with must have finished before another is pruned."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process works on, until it is released."""

    study: optuna.Study
    trial: optuna.trial.Trial
    point: Point
    folder: Path
    lock: Lock
    taken_over: bool
    """Another process began it."""
    prunes: bool
    alike: frozenset[str] = frozenset(("seed",))
    """Keys in which another trial must be like it for their losses at one step to be compared."""

    @property
    def title(self) -> str:
        return f"trial {int(self.folder.name)} ({words(self.point)})"

    def goes_on(self, step: int, loss: float) -> bool:
        """Record an evaluation; False if the trial is to be pruned."""
        with quiet():
            self.trial.report(loss, step)
            self.alive()
            return not (self.prunes and below_median(self.study, self.trial.number, self.alike))

    def alive(self) -> None:
        """Count no death of its process: it came as far as an evaluation, or ended by an exception."""
        if self.trial.user_attrs.get("deaths"):
            self.trial.set_user_attr("deaths", 0)

    def spent(self, seconds: float) -> None:
        """Add to the seconds spent on it."""
        self.trial.set_user_attr("seconds", self.trial.user_attrs.get("seconds", 0.0) + seconds)

    def ended(self, summary: JsonDict) -> None:
        """Record the summary of its run, which has ended, pruned or not."""
        loss = summary["eval_loss"]
        if not math.isfinite(loss):
            self.failed(f"the held-out loss is {loss}")
            return
        self.trial.set_user_attr("summary", summary)
        pruned = "pruned" in summary
        with quiet():
            self.trial.report(loss, summary["eval_step"])
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
            self.study.tell(self.trial, None if pruned else loss, state=state)

    def failed(self, error: str) -> None:
        """Record why its run failed."""
        with quiet():
            self.trial.set_user_attr("error", error)
            self.study.tell(self.trial, state=TrialState.FAIL)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def below_median(study: optuna.Study, number: int, alike: frozenset[str]) -> bool:
    """Whether a trial does worse than the median: its lowest loss is above that of finished ones at its step.

    Only trials with its values of `alike` count: one that drew an unlucky seed is no worse than the others
    with it, and one that --budget gives more steps has spent less of them.
    """
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    own, step = {key: trial.params.get(key) for key in alike}, trial.last_step
    if not step:  # the loss before the first step tells nothing about a trial
        return False
    finished = [
        other.intermediate_values
        for other in trials
        if other.state == TrialState.COMPLETE and {key: other.params.get(key) for key in alike} == own
    ]
    known = [losses[step] for losses in finished if step in losses]
    if len(finished) < UNPRUNED or not known:
        return False
    return min(trial.intermediate_values.values()) > statistics.median(known)
