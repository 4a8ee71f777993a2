"""What a step trains on: features and token ids of some samples, and sums over their texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from llava_core.language.prompt_and_labels import IGNORE, Example


@dataclasses.dataclass(frozen=True)
class TextCounts:
    """Sums over the texts of some samples: what throughput and needed operations are computed from."""

    samples: int
    pictures: int
    """Samples with a picture."""
    tokens: int
    """Text tokens."""
    beside_pictures: int
    """Those of them in samples with a picture."""
    squares: int
    """Sum of the squares of each sample's text tokens."""
    answers: int
    """Target tokens."""
    cut: int
    """Answers cut at --max-text-tokens."""
    dropped: int
    """Turns left out after a cut answer."""

    @staticmethod
    def of(examples: Sequence[Example]) -> TextCounts:
        lengths = [len(example.ids) for example in examples]
        return TextCounts(
            len(examples),
            sum(example.picture for example in examples),
            sum(lengths),
            sum(len(example.ids) for example in examples if example.picture),
            sum(length * length for length in lengths),
            answer_tokens(examples),
            sum(example.cut for example in examples),
            sum(example.dropped for example in examples),
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Features fp16 [samples with a picture, T, D], on the CPU or where they are cached; texts of all."""

    features: torch.Tensor
    examples: list[Example]
    counts: TextCounts
    error: Exception | None = None
    """Why there are no samples in it, although there should be."""

    def to(self, device: torch.device) -> Batch:
        return dataclasses.replace(self, features=self.features.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """With features on the CPU where a GPU reads them while the host goes on."""
        on_gpu = self.features.is_cuda
        return self if on_gpu else dataclasses.replace(self, features=self.features.pin_memory())


def answer_tokens(examples: Sequence[Example]) -> int:
    """Number of target tokens: those the loss falls on."""
    return sum(sum(label != IGNORE for label in example.labels) for example in examples)
