"""Flags of `train sweep`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from llava_core.errors import LlavaError
from llava_core.input_folders import folders_of
from train.config import RunConfig
from train.sweep.budget import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(RunConfig):
    """Many runs, with the language model and the features loaded once; the same command continues.

    Start it several times, or as a SLURM array, with the same flags: the processes share the trials.
    """

    groups: ClassVar[Mapping[str, str]] = {
        "Often changed": "trials budget choices prune",
        "Tuning": "together ray ray_workers",
    }

    space: tuple[str, ...]
    """What varies: lr=5e-4,1e-3 projector=linear,mlp seed=0,1 tries each combination; lr=1e-4..1e-2:log is a
    range, for --trials; features=A,B,A+B compares folders of --features, by name, and some fused. Or one YAML
    file of such lines (key: [a list], or key: a range)."""
    out: Path
    """Folder of the sweep: trials/, results.csv, index.html, `best`."""
    trials: int | None = None
    """Draw N points, each for every seed: of lists at random, with a range where trials look best (TPE)."""
    budget: str | None = None
    """Give every trial the same: steps=N; flops=N, such as 2e15, by the operations predicted for its steps;
    or seconds=N, by the time of its steps as measured here. The learning rate ends there."""
    choices: int | None = None
    """After each trial, N-way forced choice on the held-out rows, as `infer rank` measures it: which of N
    captions, the others of other images, is the most likely; and again with shuffled pictures."""
    prune: Literal["auto", "median", "none"] = "auto"
    """End a trial whose held-out loss is above the median, at that step, of the finished ones with its seed
    (with --budget flops or seconds also its number of steps), once there are five; auto does so with ranges
    alone."""
    together: int | Literal["auto"] = 1
    """Train up to N trials in one pass, where they differ in projector and optimizer alone; auto measures
    how many are fastest here, which may be one."""
    ray: str | None = None
    """Address of a Ray cluster (auto, or HOST:6379) whose workers share the trials."""
    ray_workers: int | None = None
    """Workers on Ray; by default one per GPU, or per 4 CPU cores where there is none."""
    retry_failed: bool = False
    """Try the trials that failed again, from their last checkpoints."""
    resume: bool = False
    """Fail unless OUT holds a sweep to continue."""
    dry_run: bool = False
    """Only print how many trials there are, and how long they take."""

    def require_inputs(self) -> None:
        from train.sweep.space import Space  # about these flags

        super().require_inputs()
        Space.of(self.varied, self)

    @property
    def varied(self) -> tuple[str, ...]:
        """What varies, as after --space."""
        return self.space

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            object.__setattr__(self, "budget", str(Budget.of(self.budget)))
            for name in ("max_steps", "epochs"):
                if getattr(self, name) != getattr(RunConfig, name):
                    flag = f"--{name.replace('_', '-')}"
                    what = f"{flag} beside --budget, which sets the steps"
                    raise LlavaError(what, expected="one of them", exit_code=2)
        if self.choices is not None:
            self.require_at_least(2, "choices")
        self.require_above_zero("trials", "ray_workers", *["together"] * (self.together != "auto"))
        if self.eval_features is None:
            raise LlavaError(
                "--eval-features", expected="held-out shards, by which trials are judged", exit_code=2
            )


LEAST_SIZES = 3
"""As many as the law has unknowns."""
APART, REACH = 1.25, 4
"""Least ratio of one size to the next smaller one, and of the largest to the smallest."""
SUFFIXES = {"k": 1_000, "m": 1_000_000}
MOST_TRIALS = 100_000
"""More trials are a slip: no sweep of that size ends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig(SweepConfig):
    """Held-out loss against the number of training rows: a sweep over random subsets, the law loss = E +
    A·N^-α fitted to it, and what twice as many rows are predicted to bring; the same command continues.

    Each size takes --epochs passes over its rows, at the end of which the learning rate is 0. It is evaluated
    after each pass, or more often (--eval-every), and its lowest loss counts.
    """

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "seeds space"}

    sizes: str
    """Rows of each folder of --features to train on, such as 500,1k,2k,4k: three sizes or more, the largest
    at least four times the smallest."""
    seeds: int = 3
    """Train each size with N seeds, from --seed on: each draws its own rows, those of a smaller size among
    those of a larger one."""
    space: tuple[str, ...] = ()
    """What else varies, in lists as for `train sweep`: each combination has a law of its own."""
    subset: Literal["first", "random"] = "random"
    """Which rows of a folder a size has: random ones, or the first in the order of shards and rows."""
    epochs: int = 8
    """Passes over the rows of each size."""

    @property
    def row_counts(self) -> tuple[int, ...]:
        """--sizes as numbers, ascending. Raises LlavaError (wrong usage) for such as fit no law."""
        return _rows(self.sizes)

    @property
    def varied(self) -> tuple[str, ...]:
        sizes, seeds = self.row_counts, range(self.seed, self.seed + self.seeds)
        return *self.space, f"max_samples={_listed(sizes)}", f"seed={_listed(seeds)}"

    def require_inputs(self) -> None:
        from train.sweep.space import Space  # about these flags

        super().require_inputs()
        if self.max_samples != RunConfig.max_samples:
            raise LlavaError("--max-samples beside --sizes", expected="one of them", exit_code=2)
        if not Space.of(self.varied, self).is_grid:
            raise LlavaError("--space of a scaling law", expected="lists", got="a range", exit_code=2)

    def __post_init__(self) -> None:
        for name in ("budget", "max_steps"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                do = f"leave out {flag}: each size takes as many passes (--epochs)"
                raise LlavaError(f"{flag} of a scaling law", do=do, exit_code=2)
        super().__post_init__()
        self.require_above_zero("seeds")
        sizes = self.row_counts
        if len(sizes) * self.seeds == LEAST_SIZES:
            what, expected = "--sizes: three runs fit any law", "four sizes, or --seeds 2 or more"
            raise LlavaError(what, expected=expected, got="--seeds 1", exit_code=2)
        if (trials := len(sizes) * self.seeds) > MOST_TRIALS:
            expected = f"at most {MOST_TRIALS:,} trials"
            raise LlavaError("--sizes and --seeds", expected=expected, got=f"{trials:,}", exit_code=2)
        for entry in self.space:
            key = entry.partition("=")[0].strip().lstrip("-").replace("-", "_")
            if flags := {"max_samples": "--sizes", "seed": "--seed and --seeds"}.get(key):
                raise LlavaError(f"--space {key} of a scaling law", do=f"give {flags}", exit_code=2)
        if self.trials is not None or self.prune == "median":
            flag = "--prune" if self.trials is None else "--trials"
            raise LlavaError(f"{flag}: the law needs every size", do=f"leave out {flag}", exit_code=2)

    def evaluates_every(self, trial: RunConfig) -> int:
        """Steps between the evaluations of a trial with these flags: those of a pass, if not fewer."""
        folders = 1 if trial.fuse else len(folders_of(trial.features))
        return min(self.eval_every, -(-trial.max_samples * folders // trial.batch_size))


def _rows(sizes: str) -> tuple[int, ...]:
    """Numbers such as 500 or 1.5k, ascending. Raises LlavaError (wrong usage) for such as fit no law."""
    rows = []
    for word in sizes.replace(",", " ").split():
        factor = SUFFIXES.get(word[-1].lower(), 1)
        try:
            number = float(word if factor == 1 else word[:-1]) * factor
        except ValueError:
            number = 0.0
        if not 1 <= number < 1e12 or abs(number - round(number)) > 1e-6:
            expected = "whole numbers above 0, such as 500,1k,2k,4k"
            raise LlavaError("--sizes", expected=expected, got=word, exit_code=2)
        rows.append(round(number))
    rows = sorted(set(rows))
    if len(rows) < LEAST_SIZES:
        expected = f"{LEAST_SIZES} different sizes or more: the law has as many unknowns"
        raise LlavaError("--sizes", expected=expected, got=sizes or "none", exit_code=2)
    close = next(((a, b) for a, b in itertools.pairwise(rows) if b < APART * a), None)
    if close or rows[-1] < REACH * rows[0]:
        expected = f"each at least {APART} times the one before, the last {REACH} times the first"
        got = " beside ".join(f"{size:,}" for size in close or (rows[0], rows[-1]))
        raise LlavaError("--sizes", expected=expected, got=got, exit_code=2)
    return tuple(rows)


def _listed(values: Iterable[int]) -> str:
    return ",".join(map(str, values))
