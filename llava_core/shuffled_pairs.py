"""Which rows show one picture, and another picture for each row: what a shuffled control pairs."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def picture_numbers(keys: Iterable[Iterable[Hashable]]) -> list[int]:
    """The number of the picture that each row shows, from 0 in the order of their first rows.

    Rows that have a key in common, such as a sha256 or an address, show one picture; a row without keys has
    one of its own.
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
    """For each row the index of one that shows another picture; None if all rows show one.

    The next row, where every row has a picture of its own. Each row is taken once, unless more than half of
    them show one picture.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, picture in enumerate(pictures):
        rows.setdefault(picture, []).append(row)
    if len(rows) < 2:
        return None
    # By picture, the one of most rows first: a shift by its length leaves every picture's rows behind.
    order = [row for own in sorted(rows.values(), key=len, reverse=True) for row in own]
    n, most = len(order), max(map(len, rows.values()))
    others = [0] * n
    for k, row in enumerate(order):
        others[row] = order[most + k % (n - most) if k < most else (k + most) % n]
    return others
