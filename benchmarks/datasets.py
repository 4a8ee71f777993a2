"""Samples as a course's trainer has them: pictures at addresses or cached features, padded in batches."""

from __future__ import annotations

import dataclasses
import io
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from llava_core.language.prompt_and_labels import IGNORE, Example
from llava_core.vision.tower import VisionTower
from train.data.samples import Samples


@dataclasses.dataclass
class Pictures(Dataset[Any]):
    """Downloaded or read, decoded in full and resized, where the trainer waits for it."""

    addresses: Sequence[str]
    example: Callable[[int], Example]
    """Words of the picture at an index."""
    tower: VisionTower

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Example]:
        address = self.addresses[index]
        if address.startswith("http"):
            with urllib.request.urlopen(address) as answer:
                content = answer.read()
        else:
            content = Path(address).read_bytes()
        size = self.tower.preprocess.size
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)), self.example(index)


@dataclasses.dataclass
class Cached(Dataset[Any]):
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Example]:
        batch = self.samples.batch([index], epoch=0)
        return batch.features[0], batch.examples[0]


@dataclasses.dataclass(frozen=True)
class Collate:
    padding: int

    def __call__(self, pairs: list[tuple[torch.Tensor, Example]]) -> tuple[torch.Tensor, ...]:
        """Pictures or features, and ids, labels and mask [batch, longest]."""
        longest = max(len(example.ids) for _, example in pairs)
        rows: list[tuple[list[int], list[int], list[int]]] = []
        for _, example in pairs:
            empty = longest - len(example.ids)
            rows.append(
                (
                    example.ids + [self.padding] * empty,
                    example.labels + [IGNORE] * empty,
                    [1] * len(example.ids) + [0] * empty,
                )
            )
        return torch.stack([picture for picture, _ in pairs]), *map(torch.tensor, zip(*rows, strict=True))
