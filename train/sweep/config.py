"""Flags of `train sweep`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from llava_core.errors import LlavaError
from train.config import RunConfig
from train.sweep.budget import Budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(RunConfig):
    """Many runs, with the language model and the features loaded once; the same command continues.

    Start it several times, or as a SLURM array, with the same flags: the processes share the trials.
    """

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
        Space.of(self.space, self)

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
