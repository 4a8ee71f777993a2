"""Which samples each step takes: a seeded permutation per epoch, or per source and its own epoch (--mix)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from train.config import RunConfig

SHARES = 1000
"""Shares of --mix are rounded to multiples of one divided by this."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """Draws from several sources by share, each from its own permutations: a function of the draw's number.

    The order is in blocks. Each block has `counts[k]` draws of source k, permuted by (seed, block).
    """

    sizes: tuple[int, ...]
    """Samples of each source; a sample's index counts those of the sources before it."""
    counts: tuple[int, ...]
    seed: int

    @staticmethod
    def of(shares: Sequence[float], sizes: Sequence[int], seed: int) -> Mix:
        """By shares that sum to 1, in the shortest blocks that have them."""
        exact = [SHARES * share for share in shares]
        counts = [math.floor(share) for share in exact]
        nearest = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])  # largest remainders first
        for k in nearest[: SHARES - sum(counts)]:
            counts[k] += 1
        common = math.gcd(*counts)
        return Mix(tuple(sizes), tuple(count // common for count in counts), seed)

    def at(self, draw: int) -> tuple[int, int]:
        """Number of a draw (from 0) -> (its source's own epoch, sample index)."""
        block, place = divmod(draw, sum(self.counts))
        source, before = _block(self.counts, self.seed, block)[place]
        epoch, k = divmod(block * self.counts[source] + before, self.sizes[source])
        own = _own_permutation(self.sizes[source], self.seed, epoch, source)
        return epoch, sum(self.sizes[:source]) + int(own[k])

    def drawn(self, draws: int) -> list[int]:
        """How many of the first `draws` are of each source."""
        blocks, rest = divmod(draws, sum(self.counts))
        first = [source for source, _ in _block(self.counts, self.seed, blocks)[:rest]]
        return [blocks * count + first.count(source) for source, count in enumerate(self.counts)]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps of a run and the samples of each: a pure function of (seed, step), so resuming needs no state."""

    samples: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    mix: Mix | None = None
    """How several sources alternate; an epoch is then as many draws as there are samples."""

    @staticmethod
    def of(config: RunConfig, sizes: Sequence[int]) -> Schedule:
        """For sources of these sizes."""
        mix = Mix.of(config.shares, sizes, config.seed) if config.shares else None
        return Schedule(sum(sizes), config.batch_size, config.epochs, config.max_steps, config.seed, mix)

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
    def drawn(self) -> list[int]:
        """How many samples of each source the run takes, with repetitions; without a mix of all together."""
        draws = self.steps * self.batch_size
        return [draws] if self.mix is None else self.mix.drawn(draws)

    @property
    def repeats(self) -> bool:
        """Whether any sample is read twice."""
        if self.mix is None:
            return self.steps > self.steps_per_epoch
        return any(drawn > size for drawn, size in zip(self.drawn, self.mix.sizes, strict=True))

    @property
    def read(self) -> int:
        """Number of different samples that the run reads."""
        sizes = (self.samples,) if self.mix is None else self.mix.sizes
        return sum(map(min, sizes, self.drawn))

    def at(self, step: int) -> tuple[list[int], list[int]]:
        """Step number (from 0) -> epoch and index of each sample."""
        if self.mix is not None:
            start = step * self.batch_size
            drawn = [self.mix.at(draw) for draw in range(start, start + self.batch_size)]
            return [epoch for epoch, _ in drawn], [index for _, index in drawn]
        epoch, k = divmod(step, self.steps_per_epoch)
        order = _permutation(self.samples, self.seed, epoch)
        indices = order[k * self.batch_size : (k + 1) * self.batch_size].tolist()
        return [epoch] * len(indices), indices

    def spread(self, most: int) -> list[int]:
        """Indices of about `most` samples that stand for those of a step."""
        evenly = range(0, self.samples, max(1, self.samples // most))
        return list(evenly) if self.mix is None else [self.mix.at(draw)[1] for draw in evenly]


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


@functools.lru_cache(maxsize=64)  # the epoch that each source is in, and the one before
def _own_permutation(n: int, seed: int, epoch: int, source: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, source + 1]).permutation(n)


@functools.lru_cache(maxsize=64)
def _block(counts: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """(source, how many of it come before in the block) of each draw."""
    order = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng([seed, block, 0, 1]).permutation(order)
    seen, places = [0] * len(counts), []
    for source in order.tolist():
        places.append((source, seen[source]))
        seen[source] += 1
    return places
