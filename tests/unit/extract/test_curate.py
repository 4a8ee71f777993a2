"""Near-duplicates and pair scores, beside what they are defined to be."""

from __future__ import annotations

import numpy as np
import pytest

from extract.curate.near_duplicates import BLOCK, near_duplicates
from extract.curate.pair_score import PairScores, compare, fit_scores
from extract.curate.reasons import caption_reasons
from extract.curate.word_order import order_scores


def by_definition(pooled: np.ndarray, least: float) -> list[int]:
    rows = pooled - pooled.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near, of = rows @ rows.T >= least, np.full(len(rows), -1)
    for k in range(len(rows)):
        before = np.flatnonzero(near[k, :k] & (of[:k] < 0))
        of[k] = before[0] if len(before) else -1
    return list(of.tolist())


@pytest.mark.parametrize("width", [16, 200])
def test_the_first_of_a_group_is_kept(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = rng.normal(size=(2 * BLOCK + 100, width))
    again = rng.integers(len(rows), size=(2, 600))
    for k, row in again.T.tolist():
        rows[k] = rows[row] + rng.normal(0, 0.03, width)  # chains and groups, within blocks and across
    found = near_duplicates(rows, 0.995)
    assert found.tolist() == by_definition(rows, 0.995)
    assert 300 < (found >= 0).sum() < 700


def test_one_picture_on_every_row_is_kept_once() -> None:
    rows = np.concatenate([np.ones((3 * BLOCK, 8)), np.eye(8)])
    assert near_duplicates(rows, 0.999)[: 3 * BLOCK].tolist() == [-1, *[0] * (3 * BLOCK - 1)]
    assert (near_duplicates(rows, 2) == -1).all()
    assert near_duplicates(rows[:1], 0.5).tolist() == [-1]
    assert near_duplicates(np.ones((3, 8)), 0.999).tolist() == [-1, 0, 0]  # none differs from their mean


def pairs(n: int, wrong: float, noise: float, seed: int = 0) -> tuple[PairScores, np.ndarray]:
    """Embeddings of n pictures, and of their captions, a share of which are those of others."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(n, 32))
    texts = images + noise * rng.normal(size=(n, 32))
    bad = rng.permutation(n)[: round(wrong * n)]
    texts[bad] = texts[np.roll(bad, 1)]
    own, shuffled = compare(images, texts, np.arange(n))
    return PairScores(own, np.sort(shuffled)), np.isin(np.arange(n), bad)


def test_the_threshold_parts_right_from_wrong() -> None:
    scores, bad = pairs(3000, 0.3, 1.0)
    dropped = scores.p > scores.threshold
    assert dropped[bad].mean() > 0.98
    assert dropped[~bad].mean() < 0.02
    assert scores.wrong == pytest.approx(0.3, abs=0.03)
    told = scores.figures(scores.threshold)
    assert told["right_dropped"] == pytest.approx(dropped[~bad].sum() / 3000, abs=0.02)
    assert (scores.similarity[dropped] <= told["similarity"] + 1e-9).all()


def test_nothing_is_dropped_where_no_caption_is_wrong() -> None:
    scores, _ = pairs(3000, 0, 0.5)
    assert scores.wrong == 0
    assert (scores.p <= scores.threshold).all()


def test_a_score_that_tells_nothing_says_that_all_are_wrong() -> None:
    rng = np.random.default_rng(0)
    captions = [f"第{k}张 {rng.integers(1000)}" for k in range(600)]
    scores = fit_scores(rng.normal(size=(600, 40)), captions)
    assert scores.wrong > 0.8  # above MOST_WRONG: `extract curate` then drops none
    assert scores.separation < 0.05


def test_words_in_no_order_are_told_from_those_in_order() -> None:
    rng = np.random.default_rng(0)
    captions = [
        f"{a}的桌子上有一只{b}色的小猫在看窗外第{k}棵树"
        for k in range(400)
        for a, b in [rng.choice(list("红黄蓝绿"), 2)]
    ]
    scores, judged = order_scores([*captions, "短的"])
    assert judged.tolist() == list(range(400))
    assert scores.wrong == 0
    assert (scores.p <= scores.threshold).all()
    bad = np.arange(400) % 4 == 0
    for k in np.flatnonzero(bad).tolist():
        captions[k] = "".join(rng.permutation(list(captions[k])))
    scores, _ = order_scores(captions)
    dropped = scores.p > scores.threshold
    assert dropped[bad].mean() > 0.95
    assert dropped[~bad].mean() < 0.02


def test_equal_captions_are_no_shuffled_pairs() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 4))
    _, shuffled = compare(images, images, np.arange(40) % 2)
    assert len(shuffled) == 40 * 20  # of each row, those of the other caption


def test_a_language_is_that_of_most_captions_or_none() -> None:
    chinese, english = ["一只橘猫在桌上"], ["a cat on a table"]
    assert caption_reasons(chinese * 7 + english * 3, "auto", 5, 99)[1] == "zh"
    assert caption_reasons(chinese * 3 + english * 7, "auto", 5, 99)[1] == "other"
    reasons, language = caption_reasons(chinese * 5 + english * 5, "auto", 5, 99)
    assert (set(reasons), language) == ({""}, "any")
    found, _ = caption_reasons(["图片", "红色的", "", *chinese * 3], "auto", 5, 2)
    assert found == ["short caption", "", "no caption", *["repeated caption"] * 3]
