"""Captions whose words are in no order: neighbours are no likelier than those of the same words shuffled."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from extract.curate.pair_score import MOST_FIT, PairScores, terms_of

LEAST_TERMS = 8
"""Shorter captions are not judged: too few of their orders differ."""


def order_scores(captions: Sequence[str]) -> tuple[PairScores, np.ndarray]:
    """Scores of the captions of LEAST_TERMS terms or more, and their numbers, int [N].

    A bigram model of the cache: the mean logarithm of how many other captions have each pair of neighbours,
    less that of the same terms shuffled; "shuffled" is that of one shuffled order less that of another. The
    terms alone, and so what a caption is about, have no effect.
    """
    step = -(-len(captions) // MOST_FIT)
    pairs: Counter[str] = Counter()
    for caption in captions[::step]:
        pairs.update(set(_neighbours(terms_of(caption))))
    draws, numbers, own, shuffled = random.Random(0), [], [], []
    for number, caption in enumerate(captions):
        terms = terms_of(caption)
        if len(terms) < LEAST_TERMS:
            continue
        first, second = (draws.sample(terms, len(terms)) for _ in range(2))
        chance = _likelihood(first, pairs, 0)
        numbers.append(number)
        own.append(_likelihood(terms, pairs, int(number % step == 0)) - chance)
        shuffled.append(_likelihood(second, pairs, 0) - chance)
    return PairScores(np.array(own), np.sort(np.array(shuffled))), np.array(numbers, np.int64)


def _neighbours(terms: Sequence[str]) -> list[str]:
    return [f"{a} {b}" for a, b in itertools.pairwise(terms)]


def _likelihood(terms: Sequence[str], pairs: Mapping[str, int], own: int) -> float:
    """Mean logarithm of the captions that have each pair of neighbours, `own` of which is this one."""
    counts = [max(0, pairs.get(pair, 0) - own) for pair in _neighbours(terms)]
    return sum(math.log1p(count) for count in counts) / len(counts)
