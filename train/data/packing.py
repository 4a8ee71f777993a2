"""Samples laid end to end in rows of tokens, each row one pass through the language model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from llava_core.device import on_its_way
from llava_core.errors import LlavaError
from llava_core.language.prompt_and_labels import IGNORE, Example
from train.data.batch import Batch

UNBOUNDED = 1 << 30
"""Tokens of a context that is not known."""
SAMPLES_UNIT = 32
LONGEST_UNIT = 128
"""For a compiled model, samples in a row and tokens of the longest are rounded up to multiples of these."""


@dataclasses.dataclass(frozen=True)
class Pack:
    """Samples as one projector sees them, end to end in N tokens, each sample `[V visual tokens][text]`, or
    its text alone if it has no picture."""

    features: torch.Tensor
    """fp16 [samples with a picture, T, D]."""
    ids: torch.Tensor
    """[N]; 0 where a visual token stands."""
    positions: torch.Tensor
    """[N] position in the own sample."""
    visual: torch.Tensor
    """[samples with a picture * V] indices of the visual tokens, as many as the projector makes of T."""
    predicting: torch.Tensor
    """[A] indices of the tokens whose next token is a target."""
    targets: torch.Tensor
    """[A] target tokens."""
    lengths: list[int]
    """Tokens of each sample; they sum to N."""

    def to(self, device: torch.device) -> Pack:
        """Its tokens in one copy; the features are there already."""
        if device.type == "cpu":
            return self
        names = ("ids", "positions", "visual", "predicting", "targets")
        parts: list[torch.Tensor] = [getattr(self, name) for name in names]
        moved = on_its_way(torch.cat(parts), device).split([*map(len, parts)])  # type: ignore[no-untyped-call]
        return dataclasses.replace(self, **dict(zip(names, moved, strict=True)))


@dataclasses.dataclass(frozen=True)
class Row:
    """What goes through the language model in one pass: packs end to end, and padding after them."""

    packs: list[tuple[int, Pack]]
    """(index of a projector, its pack)."""
    padding: int
    """Tokens after the packs: a sample of their own, which no other sees."""
    positions: torch.Tensor
    """[N] position in the own sample."""
    starts: torch.Tensor
    """int32 [samples + 1]: where samples begin, and N; more N may follow, for samples of no token."""
    longest: int
    """Tokens of the longest sample, or more."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """How batches are cut and laid out for passes through the language model."""

    micro_tokens: int
    """Most tokens in one pass, padding left out."""
    unit: int = 1
    """Row lengths in tokens are padded to multiples of this; 1 pads nothing."""
    context: int = UNBOUNDED
    """Most tokens of a sample: the language model's context length."""
    room: int = UNBOUNDED
    """Most tokens of several samples in one pass, where memory is short; a longer one goes alone."""

    def rows(self, batch: Batch, visual: Sequence[int]) -> Iterator[Row]:
        """Rows of a batch as several projectors see it: projector k makes `visual[k]` tokens of each sample.

        Rows are on the device of the features. Raises LlavaError if one sample alone is longer than a row, or
        than the context.
        """
        n, device = len(batch.examples), batch.features.device
        laid: dict[tuple[int, int, int], Pack] = {}  # projectors of one kind share their packs
        lengths = [tokens_of(example, v) for v in visual for example in batch.examples]
        shown = [0, *itertools.accumulate(example.picture for example in batch.examples)]
        for start, end in cut(lengths, self.micro_tokens, self.context, self.room):
            packs = []
            for k in range(start // n, (end - 1) // n + 1):
                first, last = max(start - k * n, 0), min(end - k * n, n)
                key = (visual[k], first, last)
                if key not in laid:
                    features = batch.features[shown[first] : shown[last]]
                    some = pack(features, visual[k], batch.examples[first:last])
                    laid[key] = some.to(device)
                packs.append((k, laid[key]))
            yield self.row(packs)

    def row(self, packs: list[tuple[int, Pack]]) -> Row:
        device = packs[0][1].ids.device
        lengths = [length for _, laid in packs for length in laid.lengths]
        padding = -sum(lengths) % self.unit
        samples = [*lengths, padding] if padding else lengths
        starts, longest = [0, *itertools.accumulate(samples)], max(samples)
        if self.unit > 1:
            starts += starts[-1:] * (-len(starts) % SAMPLES_UNIT)
            longest += -longest % LONGEST_UNIT
        positions = [*(laid.positions for _, laid in packs), torch.arange(padding, device=device)]
        moved = on_its_way(torch.tensor(starts, dtype=torch.int32), device)
        return Row(packs, padding, torch.cat(positions), moved, longest)


def cut(
    lengths: Sequence[int], most: int, context: int = UNBOUNDED, room: int = UNBOUNDED
) -> Iterator[tuple[int, int]]:
    """(start, end) of groups of consecutive items, of at most `most` tokens; of several, at most `room`.

    Raises LlavaError for an item that is longer alone, or longer than `context`.
    """
    start = tokens = 0
    for end, length in enumerate(lengths):
        if length > context:
            raise LlavaError(
                "a sample does not fit the language model's context",
                expected=f"at most {context:,} tokens, visual ones included",
                got=f"{length:,}",
                do="lower --max-text-tokens, or leave dialogues that long out of the data",
            )
        if length > most:
            raise LlavaError("a sample has too many tokens", expected=f"at most {most}", got=length,
                             do="raise --micro-tokens or lower --max-text-tokens")  # fmt: skip
        if tokens and tokens + length > min(most, room):
            yield start, end
            start, tokens = end, 0
        tokens += length
    if start < len(lengths):  # a rank may have no sample in a step
        yield start, len(lengths)


def tokens_of(example: Example, visual: int) -> int:
    """Tokens of a sample, of which a picture makes `visual`."""
    return visual * example.picture + len(example.ids)


def pack(features: torch.Tensor, visual: int, examples: Sequence[Example]) -> Pack:
    """Lay samples end to end: features [samples with a picture, T, D], each of which becomes `visual` tokens,
    and the text of each sample."""
    lengths = [tokens_of(example, visual) for example in examples]
    ids, labels = [], []
    for example in examples:
        ids += [0] * (visual * example.picture) + example.ids
        labels += [IGNORE] * (visual * example.picture) + example.labels
    # Token i predicts token i + 1; a sample's first label is always context, so none crosses into the next.
    following = torch.tensor([*labels[1:], IGNORE])
    predicting = torch.nonzero(following != IGNORE).squeeze(1)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)[[example.picture for example in examples]]
    return Pack(
        features=features,
        ids=torch.tensor(ids),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        visual=(starts[:, None] + torch.arange(visual)).flatten(),
        predicting=predicting,
        targets=following[predicting],
        lengths=lengths,
    )
