"""Whether training rows can teach anything: figures of their features and captions, for the verdict."""

from __future__ import annotations

import collections
import statistics

import torch

from llava_core.shuffled_pairs import picture_numbers
from llava_core.types import JsonDict
from train.data.samples import Samples

ROWS_READ = 256
"""Training rows, evenly spaced, whose features and captions are looked at before the first step."""


def data_figures(samples: Samples) -> JsonDict:
    """What ROWS_READ of the samples with a picture are like.

    data_varied: the share of their pooled features' energy by which pictures differ; data_empty: the share of
    rows whose features are zero, or those of the row before, which shows another picture; captions_repeated:
    the share with the most frequent text; captions_cut: the share cut at --max-text-tokens. Rows of one
    picture neither vary nor repeat: then there are data_empty and captions_cut alone.
    """
    shown = samples.with_picture
    indices = shown[:: -(-len(shown) // ROWS_READ)].tolist()
    pooled = samples.read(indices).float().mean(1)
    energy = pooled.square().sum(1).mean().item()
    empty = (pooled == 0).all(1)
    places = [samples.place(index) for index in indices]
    pictures = torch.tensor(picture_numbers(samples.shards[s].picture_keys(row) for s, row in places))
    empty[1:] |= (pooled[1:] == pooled[:-1]).all(1) & (pictures[1:] != pictures[:-1])
    texts = collections.Counter(samples.shards[shard].caption(row) for shard, row in places)
    figures: JsonDict = {
        "data_empty": empty.float().mean().item(),
        "captions_cut": statistics.fmean(samples.example(index, 0).cut for index in indices),
    }
    if pictures.any():
        figures["data_varied"] = pooled.var(0, correction=0).sum().item() / energy if energy else 0.0
        figures["captions_repeated"] = max(texts.values()) / len(indices)
    return figures
