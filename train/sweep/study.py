"""The trials of a sweep: which to take next, and how each ended.

Optuna's own grid sampler may hand one point to two processes. So a trial is claimed here, with `study.lock`
held: first one that nobody works on any more, then a point that nobody has tried. A process keeps the lock of
a trial's folder for as long as it works on it, and the kernel drops that lock when the process dies.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import optuna
from optuna.trial import TrialState

from llava_core.errors import LlavaError
from llava_core.filesystem import Held, Lock
from llava_core.identity import LanguageModelIdentity
from llava_core.types import JsonDict
from train.config import SweepConfig
from train.sweep.space import Point, Space, words
from train.sweep.study_folder import Turn, open_journal, quiet, require_same

MOST_DEATHS = 3
"""Processes that may die over one trial, without a checkpoint between, before it counts as the cause."""
STARTUP = 8
"""Points drawn at random before the others are a guide."""
UNPRUNED = 5
"""Trials of one seed that must have finished before another of that seed is pruned."""

LANGUAGE_MODEL = "the language model"

State = Literal["finished", "pruned", "failed", "running", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a trial."""

    number: int
    state: State
    point: Point
    folder: Path
    loss: float | None = None
    """Held-out loss of its last evaluation, in nats per answer token."""
    summary: JsonDict = dataclasses.field(default_factory=dict)
    """Of its run, once it has ended."""
    seconds: float = 0.0
    """Its share of the time that its process spent on it."""
    error: str | None = None
    """Why it failed."""


class Study:
    """Raises LlavaError if the folder holds a sweep of another space, or with other flags."""

    def __init__(self, config: SweepConfig, space: Space, shared_flags: JsonDict) -> None:
        self.folder, self.space, self.points = config.out, space, config.trials
        optuna.logging.disable_default_handler()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.turn = Turn(self.folder / "study.lock")
        with self.turn, quiet():
            self.moved = require_same(self.folder, {"space": space.plain(), "flags": shared_flags})
            """Whether folders have other names than when it began."""
            self.study = open_journal(self.folder)
        self.prunes = config.prune == "median" or (config.prune == "auto" and not space.is_grid)

    def claim(self, most: int, alike: Callable[[Point], object]) -> list[Claim]:
        """Up to `most` trials that nobody works on, `alike` if there is a choice; none if all are taken."""
        claims: list[Claim] = []
        with self.turn, quiet():
            for found in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if len(claims) < most and (claim := self._claimed(found)):
                    claims.append(claim)
            while len(claims) < most:
                kind = alike(claims[0].point) if claims else None
                fixed = next((p for p in self._free() if not claims or alike(p) == kind), None)
                if fixed is None:
                    fixed = {"seed": self.space.seeds[0]} if self.space.seeds else {}
                    if not self._may_draw() or (claims and not fixed.items() <= claims[0].point.items()):
                        break
                claim = self._claimed(self._new(fixed), taken_over=False)
                assert claim is not None
                claims.append(claim)
        return claims

    def require_same_data(self, data: JsonDict, llm: LanguageModelIdentity) -> None:
        """Keep what the trials read, or raise LlavaError naming what of it has changed since the first."""
        data = {**data, LANGUAGE_MODEL: llm.to_json()}
        do = "restore them, or choose another --out: the losses of one table are of the same data"
        with self.turn, quiet():
            before = self.study.user_attrs.get("data")
            if before is None:
                self.study.set_user_attr("data", before := data)
        if isinstance(known := before[LANGUAGE_MODEL], str):  # version 0.1 kept the weights' sha256 alone
            known = {"id": llm.id, "hidden": llm.hidden, "weights_sha256": known}
        message = f"{LANGUAGE_MODEL} of the sweep in {self.folder} has changed since it began"
        LanguageModelIdentity.from_json(known).require_same(llm, message, do)
        unknown = {} if self.moved else data  # what an earlier version did not keep
        kept = {name: before.get(name, unknown.get(name)) for name in data if name != LANGUAGE_MODEL}
        changed = [name for name, value in kept.items() if value != data[name]]
        if changed:
            what = f"{' and '.join(changed)} of the sweep in {self.folder} have changed since it began"
            raise LlavaError(what, do=do)

    def records(self) -> list[Record]:
        """Every trial so far, in the order in which they began; call it while holding `turn`."""
        with quiet():
            return [self._record(found) for found in self._latest()]

    def left(self) -> int:
        """Trials that have not ended, those that have not begun among them."""
        done = sum(found.state.is_finished() for found in self._latest())
        return max(0, self.space.size(self.points) - done)  # --trials may be fewer than before

    def running(self) -> int:
        """Trials whose locks are held: a process works on them, or has just died."""
        with self.turn:
            return sum(record.state == "running" for record in self.records())

    def retry_failed(self) -> int:
        """Let the trials that failed go on where they stood, by who claims them next; returns how many."""
        with self.turn, quiet():
            failed = [found for found in self._latest() if found.state == TrialState.FAIL]
            for found in failed:
                known = {"number": _number(found), "seconds": found.user_attrs.get("seconds", 0.0)}
                again = optuna.trial.create_trial(
                    state=TrialState.RUNNING,
                    params=found.params,
                    distributions=found.distributions,
                    user_attrs=known,
                )
                self.study.add_trial(again)  # Optuna reopens none that has ended
        return len(failed)

    def hopeless(self, number: int) -> bool:
        """Whether the trial's lowest loss is above the median of those that finished, at the same step.

        Of those with its seed alone: one that drew an unlucky seed is no worse than the others with it.
        """
        trials = self._trials()
        found = trials[number]
        seed, step = found.params.get("seed"), found.last_step
        if not step:  # the loss before the first step says nothing of a trial
            return False
        finished = [
            other.intermediate_values
            for other in trials
            if other.state == TrialState.COMPLETE and other.params.get("seed") == seed
        ]
        known = [losses[step] for losses in finished if step in losses]
        if len(finished) < UNPRUNED or not known:
            return False
        return min(found.intermediate_values.values()) > statistics.median(known)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _latest(self) -> list[optuna.trial.FrozenTrial]:
        """Those that have begun; of those that were tried again, the last try alone."""
        return list({_number(found): found for found in self._begun()}.values())

    def _begun(self) -> list[optuna.trial.FrozenTrial]:
        """Without one that a kill left before its values were drawn."""
        return [found for found in self._trials() if found.state != TrialState.WAITING]

    def _free(self) -> Iterator[Point]:
        """Points that are known and that nobody has begun."""
        begun = [found.params for found in self._begun()]
        if self.space.is_grid:
            known = self.space.grid(self.points)
        else:
            drawn = ({key: point[key] for key in self.space.axes} for point in begun)
            known = self.space.seeded([dict(items) for items in {tuple(point.items()): 0 for point in drawn}])
        taken = {frozenset(point.items()) for point in begun}
        return (point for point in known if frozenset(point.items()) not in taken)

    def _may_draw(self) -> bool:
        first = self.space.seeds[:1]
        drawn = sum(not first or found.params.get("seed") in first for found in self._latest())
        if self.points is None or self.space.is_grid:
            return False
        return drawn < min(self.points, self.space.count or self.points)

    def _new(self, fixed: Point) -> optuna.trial.FrozenTrial:
        """A trial with these values, and others drawn."""
        # Several processes draw, and draw again after a restart: a seed of one's own would repeat itself.
        seed = len(self._trials())
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP, constant_liar=True
        )
        if not self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # left by a kill here
            draws = self.space.count and not self.space.axes.keys() <= fixed.keys()
            self.study.enqueue_trial(self._untried(fixed) if draws else dict(fixed))
        trial = self.study.ask()
        self.space.suggest(trial)
        return self._trials()[trial.number]

    def _untried(self, fixed: Point) -> Point:
        """A point with these values: TPE's draw, or a random one instead of what was tried before."""
        trials = self._begun()
        tried = [{key: found.params[key] for key in self.space.axes} for found in trials]
        rehearsal = optuna.create_study(sampler=self.study.sampler)
        rehearsal.add_trials(trials)
        rehearsal.enqueue_trial(dict(fixed))
        point = self.space.suggest(rehearsal.ask())
        draws = random.Random(len(trials))
        while {key: point[key] for key in self.space.axes} in tried:
            point = {**point, **{key: axis.pick(draws) for key, axis in self.space.axes.items()}}
        return point

    def _claimed(self, found: optuna.trial.FrozenTrial, taken_over: bool = True) -> Claim | None:
        """The trial, with its folder locked; None if another process works on it, or it is given up."""
        folder = self._folder(found)
        try:
            lock = Lock(folder / "trial")
        except Held:
            return None
        found = self._trials()[found.number]  # it may have ended since it was listed
        if found.state.is_finished():
            lock.release()
            return None
        trial = optuna.trial.Trial(self.study, found._trial_id)
        claim = Claim(self, trial, self.space.suggest(trial), folder, lock, taken_over)
        reached = os.path.basename(os.path.realpath(folder / "last"))
        deaths = found.user_attrs.get("deaths", 0) if found.user_attrs.get("reached") == reached else 0
        if deaths >= MOST_DEATHS:
            claim.failed(f"its process died {deaths} times without a checkpoint between")
            lock.release()
            return None
        trial.set_user_attr("deaths", deaths + 1)  # unless it says otherwise
        trial.set_user_attr("reached", reached)
        return claim

    def _folder(self, found: optuna.trial.FrozenTrial) -> Path:
        return self.folder / f"trials/{_number(found):04d}"

    def _record(self, found: optuna.trial.FrozenTrial) -> Record:
        known = found.user_attrs
        last = found.last_step
        loss = found.value if last is None else found.intermediate_values[last]
        states: dict[TrialState, State] = {
            TrialState.COMPLETE: "finished",
            TrialState.PRUNED: "pruned",
            TrialState.FAIL: "failed",
        }
        folder = self._folder(found)
        state = states.get(found.state) or ("running" if _is_locked(folder / "trial") else "interrupted")
        return Record(
            _number(found),
            state,
            {key: found.params[key] for key in self.space.keys if key in found.params},
            folder,
            None if state == "failed" else loss,
            known.get("summary", {}),
            known.get("seconds", 0.0),
            known.get("error"),
        )


@dataclasses.dataclass(frozen=True)
class Claim:
    """A trial that this process works on, until it is released."""

    study: Study
    trial: optuna.trial.Trial
    point: Point
    folder: Path
    lock: Lock
    taken_over: bool
    """Another process began it."""

    @property
    def title(self) -> str:
        return f"trial {int(self.folder.name)} ({words(self.point)})"

    def goes_on(self, step: int, loss: float) -> bool:
        """Note an evaluation; False if the trial is to be pruned."""
        with quiet():
            self.trial.report(loss, step)
            self.alive()
            return not (self.study.prunes and self.study.hopeless(self.trial.number))

    def alive(self) -> None:
        """The process has not died over it: it came as far as an evaluation, or was told to stop."""
        if self.trial.user_attrs.get("deaths"):
            self.trial.set_user_attr("deaths", 0)

    def spent(self, seconds: float) -> None:
        """Add to the time that it took."""
        self.trial.set_user_attr("seconds", self.trial.user_attrs.get("seconds", 0.0) + seconds)

    def ended(self, summary: JsonDict) -> None:
        """Its run has ended, pruned or not."""
        loss = summary["eval_loss"]
        if not math.isfinite(loss):
            self.failed(f"the held-out loss is {loss}")
            return
        self.trial.set_user_attr("summary", summary)
        pruned = "pruned" in summary
        with quiet():
            self.trial.report(loss, summary["eval_step"])
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
            self.study.study.tell(self.trial, None if pruned else loss, state=state)

    def failed(self, error: str) -> None:
        with quiet():
            self.trial.set_user_attr("error", error)
            self.study.study.tell(self.trial, state=TrialState.FAIL)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _number(found: optuna.trial.FrozenTrial) -> int:
    """What a trial and its folder are called; one that is tried again keeps its number."""
    number: int = found.user_attrs.get("number", found.number)
    return number


def _is_locked(what: Path) -> bool:
    if not what.with_name(what.name + ".lock").exists():
        return False
    try:
        with Lock(what):
            return False
    except Held:
        return True
