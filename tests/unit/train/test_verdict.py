"""Verdicts by the lines of a run's metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest

from train.verdict import ANSWERS, FOUND, late_share, verdict_of

DATA = {"step": 0, "data_varied": 0.1, "data_empty": 0.0, "captions_repeated": 0.02, "captions_cut": 0.0}
TRUE = [f"caption {k}" for k in range(ANSWERS)]


def run(
    *losses: float,
    gap: float = 1.0,
    low: float | None = None,
    said: list[str] = TRUE,
    trained: float = 0.3,
    rms: float = 5.0,
    **data: float,
) -> list[dict[str, Any]]:
    """Metrics of a run evaluated every 100 steps."""
    evals = [
        {
            "step": 100 * k,
            "eval_loss": loss,
            "eval_grounding_gap": gap,
            "eval_visual_rms": rms,
            "eval_grounding_gap_low": gap / 2 if low is None else low,
            "eval_captions": [{"generated": a, "written": b} for a, b in zip(said, TRUE, strict=True)],
        }
        for k, loss in enumerate(losses)
    ]
    return [DATA | data, *evals, {"step": 100 * len(losses), "loss": trained}]


@pytest.mark.parametrize(
    ("expected", "lines"),
    [
        ("healthy", run(3.0, 0.6, 0.4, 0.3, 0.3)),
        ("healthy", run(3.0, 0.6, 0.3, 0.3, 0.31)),  # a rise within the noise
        ("broken data", run(3.0, 0.6, 0.4, 0.3, 0.3, data_empty=0.5)),
        ("broken data", run(3.0, 0.6, 0.4, 0.3, 0.3, data_varied=0.0)),
        ("broken data", run(3.0, 0.6, 0.4, 0.3, 0.3, captions_repeated=1.0)),
        ("broken data", run(3.0, 0.6, 0.4, 0.3, 0.3, captions_cut=0.9)),
        ("diverging", run(3.0, 5.0, 6.0, 6.0, 6.0, trained=5.0)),
        ("diverging", run(3.0, 0.6, 0.4, 0.3, 0.3, rms=5000.0)),
        ("overfitting", run(3.0, 5.0, 6.0, 6.0, 6.0)),
        ("overfitting", run(3.0, 1.1, 1.0, 1.0, 1.0)),
        ("overfitting", run(3.0, 0.6, 0.4, 0.5, 0.7)),
        ("blind", run(3.0, 1.6, 1.5, 1.5, 1.5, trained=1.5, gap=0.01)),
        ("blind", run(3.0, 1.6, 1.5, 1.5, 1.5, trained=1.5, gap=0.1, low=-0.05)),
        ("parroting", run(3.0, 0.6, 0.4, 0.3, 0.3, said=["a picture"] * ANSWERS)),
        ("underfitting", run(3.0, 2.9, 2.9, 2.9, 2.9, trained=2.9)),
        ("diverging", run(3.0, 3.5, 3.1, 2.9, 2.9, trained=2.9)),  # at too high a rate, until that decayed
        ("diverging", run(3.0, 3.5, 3.1, 2.5, 2.0, trained=2.0)),
        ("underfitting", run(3.0, 2.5, 2.0, 1.5, 1.0, trained=1.0)),
        ("healthy", run(0.3)[:2]),  # `train eval` of a checkpoint whose run is not there
        ("healthy", run(3.0, 0.3)),  # nobody looked at half the steps
        ("diverging", run(3.0, math.nan)),
        ("blind", run(1.5, gap=0.0)[:2]),
        ("parroting", run(0.3, said=["a picture"] * ANSWERS)[:2]),
    ],
)
def test_each_by_its_curve(expected: str, lines: list[dict[str, Any]]) -> None:
    verdict = verdict_of(lines)
    assert verdict is not None
    assert verdict.name == expected
    assert verdict.evidence
    assert verdict.to_json()["verdict_next"]


def test_what_began_from_a_trained_projector_need_not_fall() -> None:
    lines = run(0.2, 0.19, 0.195, 0.195)
    for continued, expected in ((False, "underfitting"), (True, "healthy")):
        assert verdict_of(lines, continued).name == expected  # type: ignore[union-attr]


def test_where_nobody_looked_at_half_the_steps_it_says_so() -> None:
    for lines, unknown in (
        (run(3.0, 0.3), True),
        (run(3.0, 0.6, 0.4, 0.3, 0.3), False),
        (run(0.3)[:2], False),
    ):
        verdict = verdict_of(lines)
        assert verdict is not None
        assert (verdict.name, FOUND["unknown"] in verdict.evidence) == ("healthy", unknown)


def test_the_fall_after_an_uneven_half_is_not_overestimated() -> None:
    evals = run(3.0, 0.9, 0.5, 0.3)[1:-1]
    for line, step in zip(evals, (0, 500, 1000, 1250), strict=True):
        line["step"] = step
    assert late_share(evals) == pytest.approx(0.2 / 2.7)


def test_none_without_held_out_rows() -> None:
    assert verdict_of([DATA, {"step": 10, "loss": 1.0}]) is None


def test_metrics_of_earlier_versions_have_no_figures_of_the_data() -> None:
    assert verdict_of(run(3.0, 0.6, 0.4, 0.3, 0.3)[1:]).name == "healthy"  # type: ignore[union-attr]
