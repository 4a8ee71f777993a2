"""Shuffled image-text pairs, for the grounding gap: a row of another picture for each row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def picture_numbers(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """Number of the picture that each row shows, from 0, in order of first appearance.

    Rows that share a key, such as a sha256 or a URL, show the same picture (union-find); a row without keys
    has a picture of its own.
    """
    above: list[int] = []
    first: dict[Hashable, int] = {}

    def root(row: int) -> int:
        while above[row] != row:
            above[row] = row = above[above[row]]
        return row

    for row, own in enumerate(keys):
        above.append(row)
        for key in own:
            known, new = root(first.setdefault(key, row)), root(row)
            above[max(known, new)] = min(known, new)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(len(above))]


def mismatched_rows(pictures: Sequence[Hashable]) -> list[int] | None:
    """For each row, the index of a row that shows another picture; None if all rows show the same.

    If all pictures differ, it is the next row. Each row is used once, unless more than half of the rows show
    one picture.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, picture in enumerate(pictures):
        rows.setdefault(picture, []).append(row)
    if len(rows) < 2:
        return None
    # Sorted by picture, the most frequent first: a shift by its count moves past every picture's own rows.
    order = [row for own in sorted(rows.values(), key=len, reverse=True) for row in own]
    n, most = len(order), max(map(len, rows.values()))
    others = [0] * n
    for k, row in enumerate(order):
        others[row] = order[most + k % (n - most) if k < most else (k + most) % n]
    return others
