"""Every shuffled control pairs a row with another picture, whatever order the rows are in."""

from __future__ import annotations

import collections

from hypothesis import given
from hypothesis import strategies as st

from llava_core.shuffled_pairs import mismatched_rows, picture_numbers


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_no_row_is_paired_with_its_own_picture(pictures: list[int]) -> None:
    others = mismatched_rows(pictures)
    if len(set(pictures)) == 1:
        assert others is None
        return
    assert others is not None
    assert all(pictures[other] != pictures[row] for row, other in enumerate(others))
    if 2 * max(collections.Counter(pictures).values()) <= len(pictures):
        assert sorted(others) == list(range(len(pictures)))


def test_pictures_of_their_own_are_paired_with_the_next() -> None:
    assert mismatched_rows("abcd") == [1, 2, 3, 0]
    assert mismatched_rows("aab") == [2, 2, 1]


def test_rows_with_a_key_in_common_show_one_picture() -> None:
    keys = [("x", "u1"), ("y", "u2"), (), ("z", "u1"), (), ("z", "u3"), ("u2",)]
    assert picture_numbers(keys) == [0, 1, 2, 0, 3, 0, 1]
