"""Samples laid end to end in one row of tokens, and attention that keeps them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from llava_core.conversation import IGNORE, Example
from llava_core.errors import LlavaError
from train.samples import Batch

ATTENTION = "llava_packed"
"""Name of `packed_attention` in transformers' attention interface."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Samples as one row of N tokens, each sample `[V visual tokens][text]`."""

    features: torch.Tensor
    """fp16 [samples, T, D]."""
    ids: torch.Tensor
    """[N]; 0 where a visual token stands."""
    positions: torch.Tensor
    """[N] position in the own sample."""
    visual: torch.Tensor
    """[samples * V] indices of the visual tokens, as many as the projector makes of T."""
    predicting: torch.Tensor
    """[A] indices of the tokens whose next token is to be learnt."""
    targets: torch.Tensor
    """[A] those next tokens."""
    lengths: list[int]
    """Tokens of each sample; they sum to N."""

    def to(self, device: torch.device) -> Pack:
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def packs(batch: Batch, visual: int, micro_tokens: int) -> Iterator[Pack]:
    """Cut a batch into packs of at most `micro_tokens` tokens, `visual` of each sample's visual, in order.

    Raises LlavaError if one sample alone is longer.
    """
    for ((_, laid),) in side_by_side(batch, [visual], micro_tokens):
        yield laid


def side_by_side(batch: Batch, visual: Sequence[int], micro_tokens: int) -> Iterator[list[tuple[int, Pack]]]:
    """A batch as several projectors see it, cut for passes of at most `micro_tokens` tokens.

    Projector k makes `visual[k]` tokens of each sample. Yields, for each pass, the packs (k, pack) in it, on
    the device of the features. Raises LlavaError if one sample alone is longer.
    """
    n = len(batch.examples)
    laid: dict[tuple[int, int, int], Pack] = {}  # projectors of one kind share their packs
    lengths = [v + len(example.ids) for v in visual for example in batch.examples]
    for start, end in cut(lengths, micro_tokens):
        together = []
        for k in range(start // n, (end - 1) // n + 1):
            first, last = max(start - k * n, 0), min(end - k * n, n)
            key = (visual[k], first, last)
            if key not in laid:
                some = pack(batch.features[first:last], visual[k], batch.examples[first:last])
                laid[key] = some.to(batch.features.device)
            together.append((k, laid[key]))
        yield together


def cut(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, end) of as many consecutive items as `most` tokens hold, and so on to the last."""
    start = tokens = 0
    for end, length in enumerate(lengths):
        if length > most:
            raise LlavaError("a sample has too many tokens", expected=f"at most {most}", got=length,
                             do="raise --micro-tokens or lower --max-text-tokens")  # fmt: skip
        if tokens + length > most:
            yield start, end
            start, tokens = end, 0
        tokens += length
    if start < len(lengths):  # a rank may have no sample in a step
        yield start, len(lengths)


def pack(features: torch.Tensor, visual: int, examples: Sequence[Example]) -> Pack:
    """Lay samples end to end: features [samples, T, D] that become `visual` tokens, and the words of each."""
    lengths = [visual + len(example.ids) for example in examples]
    ids, labels = [], []
    for example in examples:
        ids += [0] * visual + example.ids
        labels += [IGNORE] * visual + example.labels
    # Token i predicts token i + 1; a sample's first label is always context, so none crosses into the next.
    following = torch.tensor([*labels[1:], IGNORE])
    predicting = torch.nonzero(following != IGNORE).squeeze(1)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return Pack(
        features=features,
        ids=torch.tensor(ids),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        visual=(starts[:, None] + torch.arange(visual)).flatten(),
        predicting=predicting,
        targets=following[predicting],
        lengths=lengths,
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    lengths: list[int],
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sample: [1, heads, N, head] -> [1, N, heads, head].

    One SDPA call per sample, so no mask and no score between samples ever exists.
    """
    if sliding_window is not None and sliding_window < max(lengths):
        raise LlavaError("this language model's sliding window is shorter than a sample",
                         expected=f"at least {max(lengths)} tokens", got=sliding_window)  # fmt: skip
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with a soft cap or sinks")
    samples = zip(*(torch.split(x, lengths, 2) for x in (query, key, value)), strict=True)
    attended = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in samples
    ]
    return torch.cat(attended, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, packed_attention)
