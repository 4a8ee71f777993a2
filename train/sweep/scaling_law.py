"""The law of data scaling, loss = E + A·N^-α (Hestness et al. 2017, arXiv:1712.00409; E is what no number of
rows lowers), fitted to runs on N rows each, with 95 % intervals.

Least squares of relative errors: for a given α, E and A >= 0 have a closed form. Intervals are those of the
profile likelihood: a figure may have every value that it takes where E, A and α fit the runs no worse than
the best ones do, by an F test (Bates and Watts 1988, Nonlinear Regression Analysis, ch. 6). Where runs do not
tell α, that region is wide, and so are the intervals of all that follows from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

ALPHAS = np.geomspace(0.01, 4, 400)
"""Exponents that are tried. Below them the law is a logarithm; above, one doubling brings nearly all."""
ANGLES = np.linspace(0, np.pi, 33)
UNKNOWNS = 3
Estimate = tuple[float, float, float]
"""A value, and the ends of its interval."""


@dataclasses.dataclass(frozen=True, eq=False)
class ScalingLaw:
    """A fitted law, of losses in nats per answer token."""

    sizes: tuple[int, ...]
    """Numbers of rows that it was fitted to, ascending."""
    best: np.ndarray
    """E, A·N^-α at the largest size, and α: [3]."""
    region: np.ndarray
    """The same, [3, points], on the surface of the 95 % region."""

    def loss(self, rows: float) -> Estimate:
        """The loss to expect of runs on as many rows."""
        return self._estimate(lambda floor, fall, alpha: floor + fall * (rows / self.sizes[-1]) ** -alpha)

    @property
    def doubling(self) -> Estimate:
        """How much lower the loss is at twice the largest size than there."""
        return self._estimate(lambda floor, fall, alpha: fall * (1 - 2**-alpha))

    @property
    def floor(self) -> Estimate:
        """E."""
        return self._estimate(lambda floor, fall, alpha: floor)

    @property
    def factor(self) -> Estimate:
        """A."""
        return self._estimate(lambda floor, fall, alpha: fall * float(self.sizes[-1]) ** alpha)

    @property
    def alpha(self) -> Estimate:
        return self._estimate(lambda floor, fall, alpha: alpha)

    @property
    def is_identified(self) -> bool:
        """Whether the runs bound α on both sides."""
        _, low, high = self.alpha
        return bool(ALPHAS[1] < low and high < ALPHAS[-2])

    def _estimate(self, of: Callable[..., np.ndarray]) -> Estimate:
        values = of(*self.region)
        return float(of(*self.best)), float(values.min()), float(values.max())


def fit(rows: Sequence[int], losses: Sequence[float]) -> ScalingLaw | None:
    """The law of runs on these numbers of rows: at least 4, of 3 sizes.

    None if the losses do not fall by more than they scatter: an F test against their mean, at 5 %.
    """
    sizes, x, y = tuple(sorted(set(rows))), np.asarray(rows, float), np.asarray(losses, float)
    free = len(y) - UNKNOWNS
    assert free > 0
    assert len(sizes) >= UNKNOWNS
    runs = _Runs(x / sizes[-1], y, np.array([y[x == size].mean() for size in x]) ** -2)
    alphas = ALPHAS
    for _ in range(3):  # then between the neighbours of the best one
        errors = runs.fitted(alphas)[2]
        k = int(errors.argmin())
        best = alphas[k]
        alphas = np.geomspace(alphas[max(0, k - 1)], alphas[min(k + 1, len(alphas) - 1)], len(ALPHAS))
    floor, fall, error = (float(each[0]) for each in runs.fitted(np.array([best])))
    if fall == 0 or error >= runs.error_of_mean * 0.05 ** (2 / free):
        return None
    most = error * (1 + _t_quantile(free) ** 2 / free)
    inside = np.flatnonzero(runs.fitted(ALPHAS)[2] <= most)
    low, high = (ALPHAS[inside[0]], ALPHAS[inside[-1]]) if len(inside) else (best, best)
    step = ALPHAS[1] / ALPHAS[0]
    fine = np.geomspace(max(ALPHAS[0], low / step), min(ALPHAS[-1], high * step), len(ALPHAS))
    region = runs.region(np.append(fine, best), most)
    return ScalingLaw(sizes, np.array([floor, fall, best]), region)


@dataclasses.dataclass(frozen=True, eq=False)
class _Runs:
    """Rows of each run as a share of the most, its loss, and the weight of its squared error."""

    share: np.ndarray
    losses: np.ndarray
    weights: np.ndarray

    @property
    def error_of_mean(self) -> float:
        mean = np.average(self.losses, weights=self.weights)
        return float((self.weights * (self.losses - mean) ** 2).sum())

    def _error(self, floor: np.ndarray, fall: np.ndarray, powers: np.ndarray) -> np.ndarray:
        off = self.losses - floor[..., None] - fall[..., None] * powers
        return np.asarray((self.weights * off**2).sum(-1))

    def _moments(self, powers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Weighted sums of 1, the powers, their squares, the losses, and losses times powers."""
        w, y = self.weights, self.losses
        return w.sum(), powers @ w, powers**2 @ w, y @ w, powers @ (w * y)

    def fitted(self, alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """E and A >= 0 (A as in ScalingLaw.best), and the sum of squared errors, for each α."""
        powers = self.share ** -alphas[:, None]
        one, p, pp, y, py = self._moments(powers)
        fall = np.clip((one * py - p * y) / (one * pp - p * p), 0, py / pp)  # at its ends E or A is 0
        floor = np.maximum(0, (y - fall * p) / one)
        return floor, fall, self._error(floor, fall, powers)

    def region(self, alphas: np.ndarray, most: float) -> np.ndarray:
        """Points [3, points] on the surface of where E, A >= 0 and the error is at most `most`."""
        powers = self.share ** -alphas[:, None]
        one, p, pp, y, py = self._moments(powers)
        determinant = one * pp - p * p
        centre = (pp * y - p * py) / determinant  # without regard to signs; an ellipse for each α
        error = self._error(centre, (one * py - p * y) / determinant, powers)
        reach = np.sqrt(np.maximum(0, most - error) * pp / determinant)
        low, high = np.maximum(0, centre - reach), centre + reach
        floor = (low + high)[:, None] / 2 + np.cos(ANGLES) * (high - low)[:, None] / 2
        middle = (py[:, None] - floor * p[:, None]) / pp[:, None]
        room = most - self._error(floor, middle, powers[:, None])
        half = np.sqrt(np.maximum(0, room) / pp[:, None])
        within = (error <= most) & (high >= 0)
        ends = [np.maximum(0, middle + sign * half) for sign in (-1, 1)]
        found = [np.stack([floor, fall, np.broadcast_to(alphas[:, None], floor.shape)]) for fall in ends]
        possible = np.broadcast_to(within[:, None], floor.shape) & (middle + half >= 0)
        return np.concatenate([each[:, possible] for each in found], axis=1)


def _t_quantile(free: int) -> float:
    """97.5th percentile of Student's t: its density over arctan(t / sqrt(free)) is cos^(free - 1)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    below = np.cumsum(np.cos(angles) ** (free - 1))
    return float(np.sqrt(free) * np.tan(np.interp(0.975 * below[-1], below, angles)))
