"""Which samples each step takes: one seeded permutation of them per epoch."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps of a run and the samples of each: a pure function of (seed, step), so resuming needs no state."""

    samples: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @staticmethod
    def of(config: RunConfig, samples: int) -> Schedule:
        return Schedule(samples, config.batch_size, config.epochs, config.max_steps, config.seed)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def ending(self) -> str:
        """Which flag ends the run, and what the other would have to be to do so."""
        whole = self.epochs * self.steps_per_epoch
        if self.max_steps is None or self.max_steps == whole:
            return f"ends with --epochs {self.epochs}"
        if self.max_steps < whole:
            share = self.max_steps / self.steps_per_epoch
            return f"ends with --max-steps {self.max_steps}, after {share:.3g} of --epochs {self.epochs}"
        needed = -(-self.max_steps // self.steps_per_epoch)
        return f"ends with --epochs {self.epochs}: --max-steps {self.max_steps} would take --epochs {needed}"

    @property
    def repeats(self) -> bool:
        """Whether any sample is read twice."""
        return self.steps > self.steps_per_epoch

    @property
    def read(self) -> int:
        """Number of different samples that the run reads."""
        return min(self.samples, self.steps * self.batch_size)

    def at(self, step: int) -> tuple[int, list[int]]:
        """Step number (from 0) -> (epoch, sample indices)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = _permutation(self.samples, self.seed, epoch)
        return epoch, order[k * self.batch_size : (k + 1) * self.batch_size].tolist()


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
