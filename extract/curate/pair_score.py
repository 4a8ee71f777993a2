"""How well each caption fits its picture, judged beside shuffled pairs of the same cache.

A pair of embeddings is compared by the cosine of what differs from the mean of all pictures and of all
captions. Shuffled pairs, a picture beside the caption of another row, say how large that is by chance.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from llava_core.cli.console import progress
from llava_core.language.instructions import HAN
from llava_core.types import JsonDict
from llava_core.vision.similarity import BATCH_SIZE
from llava_core.vision.tower import VisionTower

SHUFFLED_PAIRS = 200_000
"""Shuffled pairs that are drawn, about, and at least LEAST_SHUFFLES for each row."""
LEAST_SHUFFLES = 4
LEAST_PAIRS = 100
"""Fewest shuffled pairs that others are judged beside: of fewer, none is the best 1 %."""
FOLDS = 4
"""Parts of the cache; each is scored by what is fitted on the others."""
FIT_ROWS = 256
"""Fewest rows that a fit is made of."""
MOST_FIT = 60_000
"""Most rows that a fit is made of, evenly spread."""
READ = 4096
"""Rows that are mapped together."""
TERMS = 1024
"""Most words, characters and pairs of them that captions are described by."""
DIRECTIONS, CORRELATIONS = 512, 64
"""Principal directions of features, and of terms, that are kept; and pairs of directions that are scored."""
RIDGE = 0.01
"""Added to each variance, as a share of the mean variance."""
TERM = re.compile(f"{HAN.pattern}|(?:(?!{HAN.pattern})[^\\W\\d_])+|\\d+")
"""A Han character, a run of other letters, or a number."""


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Scores of N pairs, beside those of shuffled ones."""

    similarity: np.ndarray
    """Cosine of each pair, fp64 [N]."""
    shuffled: np.ndarray
    """The same of shuffled pairs, ascending."""

    @property
    def p(self) -> np.ndarray:
        """Share of the shuffled pairs that are at least as similar as each pair, fp64 [N]."""
        below = np.searchsorted(self.shuffled, self.similarity, side="left")
        return np.asarray(1 - below / len(self.shuffled))

    @property
    def wrong(self) -> float:
        """Estimated share of pairs whose caption is of another picture, from above: twice those less similar
        than the median shuffled pair, below which right ones seldom lie (J. D. Storey, 2002)."""
        return min(1.0, 2 * float((self.p > 0.5).mean()))

    @property
    def separation(self) -> float:
        """Share of the pairs that are more similar than 99 % of the shuffled ones."""
        return float((self.p <= 0.01).mean())

    @property
    def threshold(self) -> float:
        """The p above which a caption is more probably of another picture than of its own.

        Of the pairs above p, wrong · (1 - p) · N are estimated to be wrong; this p maximises their number
        less that of the others.
        """
        p = np.sort(self.p)
        above = 1 - np.searchsorted(p, p, side="right") / len(p)
        gain = 2 * self.wrong * (1 - p) - above
        best = len(p) - 1 - int(gain[::-1].argmax())
        return float(p[best]) if gain[best] > 0 else 1.0

    def figures(self, threshold: float) -> JsonDict:
        """What the threshold is estimated to do to wrong and right pairs."""
        dropped = float((self.p > threshold).mean())
        caught = min(dropped, self.wrong * (1 - threshold))
        at = min(len(self.shuffled) - 1, int((1 - threshold) * len(self.shuffled)))
        return {
            "wrong": self.wrong,
            "better_than_99_of_100": self.separation,
            "mismatched": threshold,
            "similarity": float(self.shuffled[at]) if threshold < 1 else None,
            "right_dropped": dropped - caught,
        }


def compare(images: np.ndarray, texts: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of N pairs of embeddings [N, P], less their means, and of shuffled ones.

    `captions` are numbers by which equal captions are known: no shuffled pair has its own.
    """
    images, texts = (_unit(embedded - embedded.mean(0)) for embedded in (images, texts))
    order = np.random.default_rng(0).permutation(len(images))
    images_drawn, texts_drawn, drawn = images[order], texts[order], captions[order]
    shifts = min(len(order) - 1, max(LEAST_SHUFFLES, SHUFFLED_PAIRS // len(order)))
    shuffled = []
    for k in range(1, shifts + 1):
        others = np.roll(np.arange(len(order)), -k)
        cosines = (images_drawn * texts_drawn[others]).sum(1)
        shuffled.append(cosines[drawn != drawn[others]])
    return (images * texts).sum(1), np.concatenate([np.zeros(0), *shuffled])


def text_tower_scores(tower: VisionTower, first: np.ndarray, captions: Sequence[str]) -> PairScores:
    """By an encoder's own text tower; `first` are class tokens after the final norm, fp16 [N, D]."""
    texts = []
    with progress(len(captions), "captions") as bar:
        for start in range(0, len(captions), BATCH_SIZE):
            texts.append(tower.encode_text(captions[start : start + BATCH_SIZE]).cpu())
            bar.update(len(texts[-1]))
    images = tower.embed_features(torch.from_numpy(first[:, None])).cpu()
    own, shuffled = compare(images.numpy(), torch.cat(texts).numpy(), _numbers(captions))
    return PairScores(own, np.sort(shuffled))


def fit_scores(features: np.ndarray, captions: Sequence[str]) -> PairScores:
    """By what the cache itself says of features [N, D] and the terms of captions, in cross-validation.

    Canonical correlation analysis (H. Hotelling, 1936) of FOLDS - 1 parts gives the directions of the last
    one; each is weighted as in the pointwise mutual information of two normal variables so correlated.
    """
    rows, numbers = len(features), _numbers(captions)
    folds = np.random.default_rng(0).permutation(rows) % FOLDS
    sample = np.arange(0, rows, -(-rows // MOST_FIT))
    terms = telling_terms([captions[row] for row in sample.tolist()])

    def read(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words = term_matrix([captions[row] for row in some.tolist()], terms)
        return features[some].astype(np.float32), words

    x, y = read(sample)
    x_directions, y_directions = _principal(x), _principal(y)
    x, y = x @ x_directions, y @ y_directions
    own, shuffled = np.zeros(rows), []
    with progress(rows, "rows", desc="fit") as bar:
        for fold in range(FOLDS):
            fit, rest = folds[sample] != fold, np.flatnonzero(folds == fold)
            (x_mean, x_map), (y_mean, y_map) = _canonical(x[fit], y[fit])
            images, texts = (np.zeros((len(rest), x_map.shape[1]), np.float32) for _ in range(2))
            for start in range(0, len(rest), READ):
                part = slice(start, start + READ)
                shown, said = read(rest[part])
                images[part] = (shown @ x_directions - x_mean) @ x_map
                texts[part] = (said @ y_directions - y_mean) @ y_map
                bar.update(len(shown))
            own[rest], others = compare(images, texts, numbers[rest])
            shuffled.append(others)
    return PairScores(own, np.sort(np.concatenate(shuffled)))


def telling_terms(captions: Sequence[str]) -> dict[str, int]:
    """The most telling terms, numbered: words, or Han characters, and pairs of neighbours; those that are in
    half of the captions tell most."""
    counts = Counter(term for caption in captions for term in set(_terms_and_pairs(caption)))
    order = sorted(counts, key=lambda term: (-counts[term] * (len(captions) - counts[term]), term))
    return {term: number for number, term in enumerate(order[:TERMS])}


def term_matrix(captions: Sequence[str], terms: Mapping[str, int]) -> np.ndarray:
    """Which captions have which terms, 0 or 1: fp32 [N, terms]."""
    matrix = np.zeros((len(captions), max(1, len(terms))), np.float32)
    for row, caption in enumerate(captions):
        matrix[row, [terms[term] for term in set(_terms_and_pairs(caption)) if term in terms]] = 1
    return matrix


def terms_of(caption: str) -> list[str]:
    """Words, Han characters and numbers of a caption, in their order."""
    return TERM.findall(caption.lower())


def _terms_and_pairs(caption: str) -> Iterator[str]:
    terms = terms_of(caption)
    yield from terms
    yield from map(" ".join, itertools.pairwise(terms))


def _numbers(captions: Sequence[str]) -> np.ndarray:
    known: dict[str, int] = {}
    return np.array([known.setdefault(caption, len(known)) for caption in captions])


def _unit(values: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(lengths > 0, lengths, 1))


def _principal(values: np.ndarray) -> np.ndarray:
    """The first DIRECTIONS principal directions of some values [N, D]: orthonormal, fp32 [D, directions]."""
    values = values - values.mean(0)
    _, vectors = np.linalg.eigh(values.T @ values)
    return np.asarray(vectors[:, -DIRECTIONS:])


def _canonical(x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean, and map to weighted canonical directions, of both sides."""
    means = x.mean(0), y.mean(0)
    x, y = x - means[0], y - means[1]
    roots = [_inverse_root(values.T @ values / len(values)) for values in (x, y)]
    left, correlations, right = np.linalg.svd(roots[0] @ (x.T @ y / len(x)) @ roots[1], full_matrices=False)
    correlations = np.minimum(correlations[:CORRELATIONS], 0.99)
    weights = np.sqrt(correlations / (1 - correlations**2))
    sides = zip(means, roots, (left[:, :CORRELATIONS], right[:CORRELATIONS].T), strict=True)
    return [(mean, root @ directions * weights) for mean, root, directions in sides]


def _inverse_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    values = np.maximum(values, 0) + max(RIDGE * float(values.mean()), 1e-12)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)
