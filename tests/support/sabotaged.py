"""A cache whose captions say what its features hold, but for some rows that are spoiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llava_core.row_status import Status
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.shards import TOKENS, header, outcome

WORDS = [
    ["红色", "蓝色", "绿色", "黄色"],
    ["圆形", "方形", "三角形", "五角星"],
    ["左边", "右边", "上面", "下面"],
]
ROWS, FAILED = 300, 7
"""Rows of each of two shards, and a row of each that has no features."""


def write_sabotaged(folder: Path, seed: int = 0) -> dict[str, list[tuple[str, int]]]:
    """Shards a.h5 and b.h5; returns (shard, row) of the rows that were spoiled, by the reason to be found.

    A "near-duplicate" is of the row before it, which is none.
    """
    rng = np.random.default_rng(seed)
    n = 2 * ROWS
    drawn = rng.integers(4, size=(n, 3))
    maps = rng.normal(size=(3, 4, TOKENS, 12))
    features = rng.normal(0, 0.3, (n, TOKENS, 12))
    for k in range(3):
        features += maps[k][drawn[:, k]]
    captions = [
        f"图里{WORDS[2][c]}有一个{WORDS[0][a]}的{WORDS[1][b]}，第{i}张" for i, (a, b, c) in enumerate(drawn)
    ]
    usable = [k for k in range(n) if k % ROWS not in (FAILED, FAILED + 1)]
    spoiled = rng.permutation([k for k in usable if k % 2])[: round(0.3 * n)]
    found: dict[str, list[tuple[str, int]]] = {}
    reasons = ("caption of another picture", "blank features", "near-duplicate", "short caption",
               "no caption", "other language", "repeated caption", "words in no order")  # fmt: skip
    for reason, rows in zip(reasons, np.array_split(spoiled, len(reasons)), strict=True):
        for k, row in enumerate(rows.tolist()):
            if reason == "caption of another picture":
                other = next(j for j in range(1, n) if (drawn[(row + j) % n] != drawn[row]).all())
                captions[row] = captions[(row + other) % n].replace("第", "共")
            elif reason == "blank features":
                features[row] = 0
            elif reason == "near-duplicate":
                features[row] = features[row - 1] + rng.normal(0, 1e-3, features[row].shape)
                a, b, c = drawn[row - 1]
                own = f"{WORDS[2][c]}是{WORDS[0][a]}的{WORDS[1][b]}，编号{row}"
                captions[row] = captions[row - 1] if k % 2 else own
            elif reason == "short caption":
                captions[row] = ("图", "a", "红色")[k % 3]
            elif reason == "no caption":
                captions[row] = ""
            elif reason == "other language":
                captions[row] = f"a picture of number {row}"
            elif reason == "words in no order":
                captions[row] = "".join(rng.permutation(list(captions[row])))
            else:
                captions[row] = "一张好看的图片"
        found[reason] = [("ab"[row // ROWS] + ".h5", row % ROWS) for row in rows.tolist()]
    for shard in range(2):
        part = slice(shard * ROWS, (shard + 1) * ROWS)
        with ShardWriter(folder / f"{'ab'[shard]}.h5", header(captions[part])) as writer:
            writer.write([_record(row, features[part][row].astype("<f2")) for row in range(ROWS)])
            writer.finish()
    return found


def _record(row: int, features: np.ndarray) -> RowRecord:
    if row == FAILED:
        return RowRecord(row, Status.HTTP_4XX, http=404)
    if row == FAILED + 1:
        return RowRecord(row, Status.TEXT_ONLY)
    return dataclasses.replace(outcome(row), features=features)
