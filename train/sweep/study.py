"""The trials of a sweep: which to claim next, and what is known of all.

Optuna's own grid sampler may hand one point to two processes. So a trial is claimed here, with `study.lock`
held: first one whose process has died, then a point that nobody has tried. A process keeps the lock of a
trial's folder for as long as it works on it, and the kernel drops that lock when the process dies.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
from optuna.trial import TrialState

from llava_core.errors import LlavaError
from llava_core.filesystem import Held, Lock
from llava_core.identity import LanguageModelIdentity
from llava_core.types import JsonDict
from train.cost_prediction import COSTLESS
from train.sweep.budget import Budget
from train.sweep.claim import Claim
from train.sweep.config import SweepConfig
from train.sweep.record import Record, State
from train.sweep.space import Point, Space
from train.sweep.study_folder import FileLock, open_journal, quiet, require_same

MOST_DEATHS = 3
"""Processes that may die in one trial, without a checkpoint between, before it counts as the cause."""
STARTUP = 8
"""Points drawn at random before TPE takes the others as a guide."""
LANGUAGE_MODEL = "the language model"
STEPS = "steps of "
"""Before the kind of trial, in the name under which its steps are kept."""
ENDED: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Study:
    """The trials in a sweep's folder. Raises LlavaError if it holds another space, or has other flags."""

    def __init__(self, config: SweepConfig, space: Space, shared_flags: JsonDict) -> None:
        self.folder, self.space, self.points = config.out, space, config.trials
        optuna.logging.disable_default_handler()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "study.lock")
        with self.lock, quiet():
            self.moved = require_same(self.folder, {"space": space.plain(), "flags": shared_flags})
            """Whether folders have other names than when it began."""
            self.study = open_journal(self.folder)
        by_cost = config.budget is not None and Budget.of(config.budget).by_cost
        self.alike = frozenset(("seed", *(space.axes.keys() - COSTLESS if by_cost else ())))
        self.prunes = config.prune == "median" or (config.prune == "auto" and not space.is_grid)

    def claim(self, most: int, can_share_step: Callable[[Point, Point], bool]) -> list[Claim]:
        """Up to `most` free trials, such as can share a step if there is a choice; none if all are taken."""
        claims: list[Claim] = []
        with self.lock, quiet():
            for found in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if len(claims) < most and (claim := self._claimed(found)):
                    claims.append(claim)
            while len(claims) < most:
                free = (p for p in self._free() if not claims or can_share_step(p, claims[0].point))
                fixed = next(free, None)
                if fixed is None:
                    fixed = {"seed": self.space.seeds[0]} if self.space.seeds else {}
                    if not self._may_draw() or (claims and not fixed.items() <= claims[0].point.items()):
                        break
                claim = self._claimed(self._new(fixed), taken_over=False)
                assert claim is not None
                claims.append(claim)
        return claims

    def require_same_data(self, data: JsonDict, llm: LanguageModelIdentity) -> None:
        """Record the trials' data; raises LlavaError naming what has changed since the first trial."""
        data = {**data, LANGUAGE_MODEL: llm.to_json()}
        do = "restore them, or choose another --out: the losses of one table are of the same data"
        with self.lock, quiet():
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

    def steps_of(self, kind: str) -> JsonDict | None:
        """The steps that --budget gives trials of a kind, as flags, once they are fixed."""
        steps: JsonDict | None = self.study.user_attrs.get(STEPS + kind)
        return steps

    def fix_steps(self, kind: str, steps: JsonDict) -> JsonDict:
        """Keep the steps of a kind, unless another process was first; returns those that are kept."""
        with self.lock, quiet():
            if (known := self.steps_of(kind)) is None:
                self.study.set_user_attr(STEPS + kind, known := steps)
        return known

    def records(self) -> list[Record]:
        """Every trial so far, in the order in which they began; call it while holding `lock`."""
        with quiet():
            return [self._record(found) for found in self._latest()]

    def left(self) -> int:
        """Trials that have not ended, those that have not begun among them."""
        done = sum(found.state.is_finished() for found in self._latest())
        return max(0, self.space.size(self.points) - done)  # --trials may be fewer than before

    def running(self) -> int:
        """Trials whose locks are held: a process works on them, or has just died."""
        with self.lock:
            return sum(record.state == "running" for record in self.records())

    def retry_failed(self) -> int:
        """Let whoever claims the failed trials next continue them; returns their number."""
        with self.lock, quiet():
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

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _latest(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that have begun; of one that was tried again, the last try alone."""
        return list({_number(found): found for found in self._begun()}.values())

    def _begun(self) -> list[optuna.trial.FrozenTrial]:
        """Trials whose values are drawn: a kill may leave one without."""
        return [found for found in self._trials() if found.state != TrialState.WAITING]

    def _free(self) -> Iterator[Point]:
        """Known points of which no trial has begun."""
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
        """A new trial with these values, and the others drawn."""
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
        """A claim on the trial, its folder locked; None if another process has it, or it killed too many."""
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
        point = self.space.suggest(trial)
        claim = Claim(self.study, trial, point, folder, lock, taken_over, self.prunes, self.alike)
        reached = os.path.basename(os.path.realpath(folder / "last"))
        deaths = found.user_attrs.get("deaths", 0) if found.user_attrs.get("reached") == reached else 0
        if deaths >= MOST_DEATHS:
            claim.failed(f"its process died {deaths} times without a checkpoint between")
            lock.release()
            return None
        trial.set_user_attr("deaths", deaths + 1)  # until `Claim.alive`
        trial.set_user_attr("reached", reached)
        return claim

    def _folder(self, found: optuna.trial.FrozenTrial) -> Path:
        return self.folder / f"trials/{_number(found):04d}"

    def _record(self, found: optuna.trial.FrozenTrial) -> Record:
        folder = self._folder(found)
        state = ENDED.get(found.state) or ("running" if _is_locked(folder / "trial") else "interrupted")
        last = found.last_step
        loss = found.value if last is None else found.intermediate_values[last]
        return Record(
            _number(found),
            state,
            {key: found.params[key] for key in self.space.keys if key in found.params},
            folder,
            None if state == "failed" else loss,
            min((value for step, value in found.intermediate_values.items() if step), default=loss),
            found.user_attrs.get("summary", {}),
            found.user_attrs.get("seconds", 0.0),
            found.user_attrs.get("error"),
        )


def _number(found: optuna.trial.FrozenTrial) -> int:
    """Number of a trial and its folder; one that is tried again keeps it."""
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
