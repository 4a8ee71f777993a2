"""Generated answers compared with right ones."""

from __future__ import annotations

import pytest

from infer.benchmark.answer_text import (
    exact_match,
    named_option,
    normalised,
    said_yes_or_no,
    vqa_accuracy,
    yes_or_no,
)

OPTIONS = {"A": "a cat", "B": "a red dog", "C": "42", "D": "红色"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"), ("two dogs", "2 dogs"), ("don't", "dont"), ("T-shirt", "t shirt"),
        ("1,000.5", "1000.5"), ("a, b", "b"), ("红色。", "红色"), ("None", "0"), ("  x\ny ", "x y"),
    ],
)  # fmt: skip
def test_text_as_vqa_compares_it(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_vqa_accuracy_leaves_each_person_out_in_turn() -> None:
    answers = ["nokia"] * 2 + ["Nokia."] + ["samsung"] * 6 + ["?"]
    assert vqa_accuracy("Nokia", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("samsung", answers) == 1
    assert vqa_accuracy("apple", answers) == 0
    assert vqa_accuracy("x", ["x"] + ["y"] * 9) == pytest.approx(0.3)
    assert exact_match("The nokia", answers)
    assert not exact_match("apple", answers)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("B. a red dog", "B"), ("A: a cat", "A"), ("E", None),
        ("The answer is B", "B"), ("答案是D。", "D"), ("A cat", "A"), ("A red dog", "B"),
        ("I see a red dog.", "B"), ("forty", None), ("It is 42.", "C"), ("一个红色的圆", "D"),
        ("A or B", None), ("A dog and a cat", "A"), ("category", None), ("", None),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(text: str, letter: str | None) -> None:
    assert named_option(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes.", "yes"), ("No, there is no dog", "no"), ("yes and no", None), ("There is not.", None),
        ("有。", "yes"), ("没有红色的圆。", "no"), ("是的", "yes"), ("不是", "no"), ("红色", None),
        ("不确定", None), ("对不起，我看不到。", None), ("有可能", None), ("不太清楚。", None),
        ("不在", "no"),
    ],
)  # fmt: skip
def test_yes_or_no_in_an_answer(text: str, said: str | None) -> None:
    assert said_yes_or_no(text) == said


def test_a_right_answer_is_yes_or_no_alone() -> None:
    assert [yes_or_no(text) for text in ("Yes", "没有。", "no dog", "有红色的")] == ["yes", "no", None, None]
