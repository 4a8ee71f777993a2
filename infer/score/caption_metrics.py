"""Corpus BLEU, ROUGE-L and CIDEr-D over words, to the numbers that COCO's own code (pycocoevalcap) gives.

Every function takes, for each picture, the words of the answer and those of each reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
NGrams = Counter[tuple[str, ...]]

ORDERS = 4
"""Longest n-grams of BLEU and CIDEr, in words."""
BETA = 1.2
"""How much more ROUGE-L weighs recall than precision."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty on another length, in words."""


def bleu(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole corpus, 0 to 1; the reference of the closest length counts.

    Source: Papineni et al. 2002, ACL P02-1040.
    """
    right, asked, length, wanted = [0] * ORDERS, [0] * ORDERS, 0, 0
    for answer, known in zip(answers, references, strict=True):
        most: NGrams = Counter()
        for reference in known:
            most |= ngrams(reference)
        for ngram, count in ngrams(answer).items():
            right[len(ngram) - 1] += min(count, most[ngram])
        for n in range(ORDERS):
            asked[n] += max(0, len(answer) - n)
        length += len(answer)
        wanted += min((abs(len(reference) - len(answer)), len(reference)) for reference in known)[1]
    brief = math.exp(min(0.0, 1 - wanted / length)) if length else 0.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= right[n] / asked[n] if asked[n] else 0.0
        scores.append(brief * product ** (1 / (n + 1)))
    return scores


def rouge_l(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean ROUGE-L, 0 to 1, of the best precision and the best recall among the references.

    Source: Lin 2004, ACL W04-1013.
    """
    scores = []
    for answer, known in zip(answers, references, strict=True):
        common = [longest_common(answer, reference) for reference in known]
        precision = max(common) / max(1, len(answer))
        recall = max(n / max(1, len(reference)) for n, reference in zip(common, known, strict=True))
        both = (1 + BETA**2) * precision * recall
        scores.append(both / (recall + BETA**2 * precision) if both else 0.0)
    return sum(scores) / len(scores)


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean CIDEr-D, 0 to 10: n-grams that few pictures' references have weigh more.

    Weights come from these references alone, so scores of different files do not compare, and one picture
    has 0. Source: Vedantam et al., arXiv:1411.5726; lengths are counted in pairs of words, as in COCO's code.
    """
    known_by_picture = [[ngrams(reference) for reference in known] for known in references]
    pictures: NGrams = Counter()
    for known in known_by_picture:
        pictures.update(set().union(*known))
    weights = {ngram: math.log(len(references) / n) for ngram, n in pictures.items()}
    unknown = math.log(len(references))

    def vectors(counts: NGrams) -> list[dict[tuple[str, ...], float]]:
        by_order: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            by_order[len(ngram) - 1][ngram] = count * weights.get(ngram, unknown)
        return by_order

    scores = []
    for answer, known in zip(answers, known_by_picture, strict=True):
        said, total = vectors(ngrams(answer)), 0.0
        for reference in known:
            pairs = max(0, len(answer) - 1) - sum(n for ngram, n in reference.items() if len(ngram) == 2)
            alike = sum(map(_clipped_cosine, said, vectors(reference)))
            total += alike * math.exp(-(pairs**2) / (2 * SIGMA**2))
        scores.append(10 * total / ORDERS / len(known))
    return sum(scores) / len(scores)


def _clipped_cosine(said: dict[tuple[str, ...], float], wanted: dict[tuple[str, ...], float]) -> float:
    """Cosine of two n-gram vectors of one order, with counts clipped to those of the reference."""
    product = sum(
        min(weight, wanted[ngram]) * wanted[ngram] for ngram, weight in said.items() if ngram in wanted
    )
    norms = math.hypot(*said.values()) * math.hypot(*wanted.values())
    return product / norms if norms else 0.0


def ngrams(words: Words) -> NGrams:
    """How often each 1 to ORDERS words in a row occur."""
    return Counter(
        tuple(words[start : start + n])
        for n in range(1, ORDERS + 1)
        for start in range(len(words) - n + 1)
    )  # fmt: skip


def longest_common(a: Words, b: Words) -> int:
    """Length of the longest sequence of words that both have in this order, gaps allowed."""
    before = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for k, other in enumerate(b):
            row.append(before[k] + 1 if word == other else max(before[k + 1], row[k]))
        before = row
    return before[-1]
