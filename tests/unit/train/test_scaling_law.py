"""The law of held-out loss against training rows, on losses whose law is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from train.sweep.scaling_law import _t_quantile, fit

SIZES = (500, 1000, 2000, 4000)


def runs(
    noise: float,
    seeds: int,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    law: tuple[float, ...] = (0.2, 3, 0.5),
) -> tuple[list[int], list[float]]:
    """Rows and losses of a law E, A, α, each loss off by a share of this standard deviation."""
    draws, (floor, factor, alpha) = np.random.default_rng(seed), law
    rows = [size for size in sizes for _ in range(seeds)]
    return rows, [(floor + factor * n**-alpha) * float(np.exp(noise * draws.normal())) for n in rows]


@pytest.mark.parametrize("law", [(0.2, 3.0, 0.5), (0.0, 5.0, 0.1), (1.5, 900.0, 1.2)])
def test_a_law_without_noise_is_found(law: tuple[float, ...]) -> None:
    found = fit(*runs(0, 1, law=law))
    assert found is not None
    assert found.floor[0] == pytest.approx(law[0], abs=1e-4)
    assert found.factor[0] == pytest.approx(law[1], rel=1e-3)
    assert found.alpha[0] == pytest.approx(law[2], rel=1e-4)
    assert found.loss(16_000) == pytest.approx([law[0] + law[1] * 16_000 ** -law[2]] * 3, rel=1e-3)
    assert found.doubling[0] == pytest.approx(found.loss(4000)[0] - found.loss(8000)[0])


@pytest.mark.parametrize(("law", "noise"), [((0.2, 3.0, 0.5), 0.005), ((1.5, 5.0, 0.2), 0.03)])
def test_intervals_have_the_truth_in_them_19_times_in_20(law: tuple[float, ...], noise: float) -> None:
    found = [fit(*runs(noise, 3, seed=seed, law=law)) for seed in range(200)]
    laws = [each for each in found if each is not None]
    assert len(laws) > 190
    floor, factor, alpha = law
    truths = {
        "loss": (floor + factor * 16_000**-alpha, [each.loss(16_000) for each in laws]),
        "alpha": (alpha, [each.alpha for each in laws]),
        "floor": (floor, [each.floor for each in laws]),
    }
    for name, (truth, figures) in truths.items():
        share = np.mean([low <= truth <= high for _, low, high in figures])
        assert 0.89 <= share <= 0.995, name
        assert all(low <= value <= high for value, low, high in figures), name


def test_losses_that_do_not_fall_have_no_law() -> None:
    draws = np.random.default_rng(0)
    flat = [fit(SIZES * 3, (1 + 0.02 * draws.normal(size=12)).tolist()) for _ in range(200)]
    assert sum(each is not None for each in flat) <= 12
    assert fit(SIZES, [1.0, 1.1, 1.2, 1.3]) is None
    assert fit(SIZES, [1.0] * 4) is None


def test_what_the_runs_do_not_tell_is_not_told() -> None:
    told, all_at_once = fit(*runs(0.002, 3)), fit([500, 1000, 2000] * 2, [1.0, 0.5, 0.49, 1.02, 0.51, 0.5])
    assert told is not None
    assert all_at_once is not None
    assert told.is_identified
    assert not all_at_once.is_identified
    assert all_at_once.alpha[2] == pytest.approx(4)
    few = fit([500, 1000, 2000, 4000], [1.0, 0.8, 0.7, 0.62])  # four runs, three unknowns
    assert few is not None
    assert not few.is_identified
    assert few.loss(64_000)[1] < 0.3 < few.loss(64_000)[0] < 0.6 < few.loss(64_000)[2]


def test_seeds_narrow_the_interval_and_distance_widens_it() -> None:
    few, many = fit(*runs(0.01, 2)), fit(*runs(0.01, 12))
    assert few is not None
    assert many is not None
    widths = [
        each.loss(rows)[2] - each.loss(rows)[1] for each in (many, few) for rows in (4000, 8000, 64_000)
    ]
    assert widths[0] < widths[1] < widths[2]
    assert widths[3] < widths[4] < widths[5]
    assert all(narrow < wide for narrow, wide in zip(widths[:3], widths[3:], strict=True))


def test_student_s_t() -> None:
    assert [round(_t_quantile(free), 3) for free in (1, 2, 5, 30)] == [12.706, 4.303, 2.571, 2.042]
