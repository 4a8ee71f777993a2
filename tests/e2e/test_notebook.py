"""The lessons of docs/learn, run from top to bottom in one kernel, with the answers of their exercises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.support.commands import started
from tests.support.notebook import LESSONS

Printed: TypeAlias = "dict[str, dict[str, str]]"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Printed:
    """What each cell of each lesson prints."""
    to = tmp_path_factory.mktemp("lessons") / "printed.json"
    with started("tests.support.notebook", "--solved", to, MPLBACKEND="agg") as process:
        _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    lessons: Printed = json.loads(to.read_text(encoding="utf-8"))
    return lessons


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text)]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_the_answers_are_right(printed: Printed, lesson: Path) -> None:
    for name, said in printed[lesson.stem].items():
        if name.startswith("answer-"):
            assert said.splitlines()[-1].startswith("right: "), f"{name}: {said}"
        elif name.startswith("exercise-"):
            assert said.splitlines()[-1].startswith("not answered yet"), name


def test_what_the_text_says_of_the_outputs_holds(printed: Printed) -> None:
    features, projector, masking, packing, schedules, grounding, stage_2, scaling = printed.values()
    assert "largest difference: 0.0\n" in features["twice"]
    patch, cls, guess = numbers(features["probe"].replace("%", ".0"))
    assert patch > cls > guess
    losses = [numbers(projector[cell])[0] for cell in ("loss", "regression")]
    assert losses[1] < 0.6 * losses[0]
    right, other = numbers(masking["tokens"])[-2:]
    assert other > right + 1
    assert "ends with <|im_end|>" in masking["end"]
    alone, careless, packed = (
        numbers(re.findall("(?:mean|packing)[^:]*: .*", packing[cell])[0])[0]
        for cell in ("alone", "naive", "packed")
    )
    assert packed == pytest.approx(alone, abs=1e-5)
    assert careless > 2 * alone
    low, fits, high, far = (line.split()[4] for line in schedules["sweep"].splitlines())
    assert float(fits) < float(high) < float(low) < float(far)
    assert "diverging" in schedules["sweep"].splitlines()[3]
    own, order, mean, another, gap = numbers(grounding["gap"])
    assert own < order < mean < another
    assert gap > 2
    (before,), (after,), (mixed,) = (numbers(stage_2[cell]) for cell in ("before", "after", "mix"))
    assert after > 2 * before > mixed
    (_, low_, high_, _), _ = (numbers(line) for line in scaling["predict"].splitlines())
    assert high_ > low_
