"""What curation reads of a cache: of each row its words, its class token and the mean of its patches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from llava_core.cli.console import progress
from llava_core.row_status import Status
from llava_core.shards.reader import Shard

READ = 256
"""Rows whose features are in memory together."""


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """Rows with features, in the order of shards and rows."""

    shards: Sequence[Shard]
    places: np.ndarray
    """(shard, row) of each, int [N, 2]."""
    captions: list[str]
    """Caption of each, or all answers of its dialogue, without spaces around it."""
    first: np.ndarray
    """First token, fp16 [N, D]: the class token, if the encoder has one."""
    pooled: np.ndarray
    """Mean of its patches, fp16 [N, D]."""
    blank: np.ndarray
    """Whether its tokens are all alike, or not finite, as no encoder gives them for a picture: bool [N]."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Shard, int]:
        shard, row = self.places[index].tolist()
        return self.shards[shard], row


def read_rows(shards: Sequence[Shard]) -> CachedRows:
    """Read every row that has features. Raises LlavaError for a damaged one."""
    places = np.array([(k, row) for k, shard in enumerate(shards) for row in shard.ok_rows()], np.int64)
    places, tokens, width = places.reshape(-1, 2), shards[0].tokens, shards[0].width
    first, pooled = (np.zeros((len(places), width), np.float16) for _ in range(2))
    blank, skipped = np.zeros(len(places), bool), int(math.isqrt(tokens) ** 2 != tokens)
    with progress(len(places), "rows") as bar:
        for start in range(0, len(places), READ):
            part = places[start : start + READ]
            features = torch.empty(len(part), tokens, width, dtype=torch.float16)
            for out, (shard, row) in zip(features.numpy(), part.tolist(), strict=True):
                shards[shard].read_into(row, out)
            own = slice(start, start + len(part))
            mean = features[:, skipped:].float().mean(1)
            blank[own] = _alike(features) | ~mean.isfinite().all(1) | ~features[:, 0].isfinite().all(1)
            first[own], pooled[own] = features[:, 0], mean.clamp(-65504, 65504)
            bar.update(len(part))
    first[blank], pooled[blank] = 0, 0
    return CachedRows(shards, places, _captions(shards), first, pooled, blank)


def _alike(features: torch.Tensor) -> torch.Tensor:
    """Which rows [N, T, D] have tokens that are all alike, or a single one of zeros: bool [N]."""
    if features.shape[1] == 1:
        return features[:, 0].eq(0).all(1)
    alike = (features[:, -1] == features[:, 0]).all(1)  # spares almost all rows the rest
    suspects = alike.nonzero()[:, 0]
    alike[suspects] = (features[suspects] == features[suspects, :1]).flatten(1).all(1)
    return alike


def _captions(shards: Sequence[Shard]) -> list[str]:
    words: list[str] = []
    for shard in shards:
        rows = np.flatnonzero(shard.status == Status.OK).tolist()
        if shard.conversations:
            words += ["\n".join(answer for _, answer in shard.turns(row)).strip() for row in rows]
        else:
            captions = shard.captions()
            words += [captions[row].strip() for row in rows]
    return words
