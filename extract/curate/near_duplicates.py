"""Near-duplicates: pictures whose pooled features all but coincide, such as one saved twice."""

from __future__ import annotations

import numpy as np

from llava_core.cli.console import progress

BLOCK = 2048
"""Rows of a block of the product of all pairs."""
DIRECTIONS = 63
"""Principal directions in which all pairs are compared; what lies outside them bounds the rest."""
SAMPLE = 20_000
"""Rows, evenly spread, that the directions are of."""
ROUNDING = 1e-4
"""Error of such a comparison in fp32, at most; that of two whole rows is far less than a similarity has."""


def near_duplicates(pooled: np.ndarray, least: float) -> np.ndarray:
    """For each row [N, D] the first row, itself kept, that it is a near-duplicate of; else -1. int64 [N].

    Two rows are near-duplicates if the cosine of what differs from the mean row is at least `least`, or if
    neither differs from it. Rows are gone through in their order, so the first of a group is the one that is
    kept.
    """
    of = np.full(len(pooled), -1)
    if len(pooled) < 2 or least > 1:
        return of
    rows = pooled.astype(np.float32)
    rows -= rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(lengths > 0, lengths, 1)
    short = _shortened(rows)
    with progress(len(rows), "rows", desc="near-duplicates") as bar:
        for start in range(0, len(rows), BLOCK):
            block = np.arange(start, min(start + BLOCK, len(rows)))
            kept = np.flatnonzero(of[:start] < 0)
            for part in np.array_split(kept, len(kept) // BLOCK + 1):
                for row, others in _near(rows, short, block, part, least):
                    of[row] = others[0] if of[row] < 0 else min(of[row], others[0])
            block = block[of[block] < 0]
            for row, others in _near(rows, short, block, block, least):
                others = others[(others < row) & (of[others] < 0)]
                of[row] = others[0] if len(others) else -1
            bar.update(min(BLOCK, len(rows) - start))
    mean = np.flatnonzero(lengths == 0)  # which are near no other row
    of[mean[1:]] = mean[:1]
    return of


def _near(
    rows: np.ndarray, short: np.ndarray, some: np.ndarray, others: np.ndarray, least: float
) -> list[tuple[int, np.ndarray]]:
    """Each of `some` rows, ascending, that is near any of the `others`, with those, ascending.

    A cosine is at most that in some directions plus the product of what is left of both rows (Cauchy and
    Schwarz): few pairs need all of their numbers, and none is missed.
    """
    left, right = np.nonzero(short[some] @ short[others].T >= least - ROUNDING)
    near = np.zeros(len(left), bool)
    for k in range(0, len(left), BLOCK):
        part = slice(k, k + BLOCK)
        pairs = rows[some[left[part]]], rows[others[right[part]]]
        near[part] = np.einsum("nd,nd->n", *pairs) >= least - 1e-6
    left, right = left[near], right[near]
    found, starts = np.unique(left, return_index=True)
    return (
        [(int(some[k]), others[own]) for k, own in zip(found, np.split(right, starts[1:]), strict=True)]
        if len(found)
        else []
    )


def _shortened(rows: np.ndarray) -> np.ndarray:
    """Rows in their principal directions, and the length of what these leave out."""
    if rows.shape[1] <= DIRECTIONS:
        return rows
    sample = rows[:: -(-len(rows) // SAMPLE)]
    _, vectors = np.linalg.eigh(sample.T @ sample)
    short = rows @ vectors[:, -DIRECTIONS:]
    left = np.sqrt(np.maximum(0, (rows**2).sum(1) - (short**2).sum(1)))
    return np.concatenate([short, left[:, None]], axis=1)
