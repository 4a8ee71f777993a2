"""Which questions `infer batch` answers together, and which lines it takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infer.batch.command import outcomes, same_length
from infer.batch.questions import OUTPUT_KEYS, read_questions
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from tests.support.aligned import write_aligned


def test_same_length_looks_ahead_for_prompts_of_one_length() -> None:
    assert list(same_length([7, 9, 7, 9, 7, 8], size=2, window=6)) == [[0, 2], [1, 3], [4], [5]]
    assert list(same_length([7, 9, 7, 9, 7, 8], size=2, window=3)) == [[0, 2], [1, 3], [4], [5]]
    assert list(same_length([7, 9, 7], size=2, window=2)) == [[0], [1], [2]]
    assert list(same_length([7] * 5, size=2, window=2)) == [[0, 1], [2, 3], [4]]


@given(st.lists(st.integers(1, 4), max_size=60), st.integers(1, 5), st.integers(1, 12))
def test_same_length_is_a_partition_that_keeps_near_the_front(
    lengths: list[int], size: int, window: int
) -> None:
    left = list(range(len(lengths)))
    for together in same_length(iter(lengths), size, window):
        assert together[0] == left[0]
        assert together == sorted(set(together) & set(left))
        assert len({lengths[index] for index in together}) == 1
        assert len(together) <= size
        assert together[-1] < left[0] + window
        left = [index for index in left if index not in together]
    assert not left


def test_a_line_with_a_key_of_the_output_is_refused_before_anything_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    lines = [{"image": "a.png", "prompt": "看", "caption": "红"}, {"image": "b.png", "answer": "old"}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(LlavaError, match=r"line 2 of .*q.jsonl has the key 'answer'; rename it"):
        read_questions(path, "看", OUTPUT_KEYS)
    path.write_text(json.dumps(lines[0]))
    assert read_questions(path, "?", OUTPUT_KEYS) == [lines[0]]


def test_numbers_that_are_not_finite_cost_one_answer_of_a_batch(tmp_path: Path) -> None:
    answerer, ids = write_aligned(tmp_path).aligned(), [5, 6, 7]
    visual = torch.zeros(3, answerer.llm.hidden)
    few = Sampling(max_tokens=3)
    (alone,) = outcomes(answerer, [visual], [ids], few, [0])
    results = outcomes(answerer, [visual, visual * math.nan, visual], [ids] * 3, few, [0] * 3)
    error = f"the logits of {answerer.llm.id} are not finite"
    assert results == [alone, {"error": error}, alone]
    assert "answer" in alone
