"""Rows of feature shards as training samples: which are usable, in which order, with which words."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np
import torch

from llava_core.errors import LlavaError
from llava_core.language.conversation import IGNORE, Conversation, Example, Turn, pick_instruction
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import picture_numbers
from train.config import RunConfig
from train.data.feature_cache import Kept


@dataclasses.dataclass(frozen=True)
class Batch:
    """Features fp16 [samples, T, D], on the CPU or where they are kept, and the words of each."""

    features: torch.Tensor
    examples: list[Example]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.features.to(device, non_blocking=True), self.examples)


class Samples:
    """Every usable row (status ok, caption not empty) of some shards, up to `limit` of them."""

    def __init__(
        self, shards: Sequence[Shard], conversation: Conversation, max_text_tokens: int, limit: int, seed: int
    ) -> None:
        self.shards = list(shards)
        self.conversation = conversation
        self.max_text_tokens = max_text_tokens
        self.seed = seed
        self.kept: Kept | None = None
        self.rows = usable_rows(self.shards, limit)
        if not self.rows:
            raise LlavaError(
                f"no usable row in {', '.join(str(shard.path) for shard in self.shards)}",
                expected="rows with features and a caption",
                do="look at the failures with `extract inspect`",
            )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Visual tokens of a sample as the encoder gave them."""
        return self.shards[0].tokens

    @property
    def place(self) -> str:
        """Where features are read from, once they have been read."""
        return "from disk" if self.kept is None else f"kept on {self.kept.features.device}"

    @property
    def feature_bytes(self) -> int:
        """Of every sample, as fp16."""
        return len(self) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one sample's features, as fp16."""
        return self.tokens * self.shards[0].width * 2

    @functools.cached_property
    def pictures(self) -> list[int]:
        """The number of each sample's picture (llava_core.shuffled_pairs): some samples may show one."""
        return picture_numbers(self.shards[shard].picture_keys(row) for shard, row in self.rows)

    @property
    def identity(self) -> str:
        """sha256, in hex, over which rows of which shards these are."""
        used = [(shard.path.name, shard.layout.uid) for shard in self.shards]
        return hashlib.sha256(json.dumps([used, self.rows]).encode()).hexdigest()

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples at `indices`."""
        return Batch(self.features(indices), [self.example(index, epoch) for index in indices])

    def features(self, indices: Sequence[int]) -> torch.Tensor:
        """Their features, from disk or from where they are kept: fp16 [samples, T, D]."""
        return self.read(indices) if self.kept is None else self.kept.take(indices, self.read)

    def worded(self, max_text_tokens: int, seed: int) -> Samples:
        """The same rows, and the features kept of them, with another budget and other instructions."""
        samples = copy.copy(self)
        samples.max_text_tokens, samples.seed = max_text_tokens, seed
        return samples

    def keep(self, device: torch.device) -> None:
        """Keep features on `device` from when they are first read."""
        self.kept = Kept((len(self), self.tokens, self.shards[0].width), device)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of the samples at `indices` from disk: fp16 [samples, T, D] on the CPU."""
        features = torch.empty(len(indices), self.tokens, self.shards[0].width, dtype=torch.float16)
        rows = features.numpy()
        for k, index in enumerate(indices):
            shard, row = self.rows[index]
            self.shards[shard].read_into(row, rows[k])
        return features

    def text_bytes(self, index: int) -> int:
        """Bytes of one sample's words: about in proportion to its tokens, and known without reading them."""
        shard, row = self.rows[index]
        return self.shards[shard].caption_bytes(row)

    def example(self, index: int, epoch: int) -> Example:
        """Words of one sample; what is drawn from the pool is a pure function of (seed, epoch, row, turn)."""
        s, row = self.rows[index]
        shard = self.shards[s]
        key = f"{epoch}/{shard.path.stem}/{row}"
        turns = []
        for k, (question, answer) in enumerate(shard.turns(row)):
            drawn = pick_instruction(self.seed, f"{key}/{k}" if k else key)
            turns.append(Turn(drawn if question is None else question, answer))
        return self.conversation.example(turns, self.max_text_tokens)


def usable_rows(shards: Sequence[Shard], limit: int) -> list[tuple[int, int]]:
    """(shard, row) of the first `limit` rows with features and a caption, in the order of shards and rows."""
    usable = (
        (s, row) for s, shard in enumerate(shards) for row in shard.ok_rows() if shard.caption(row).strip()
    )
    return list(itertools.islice(usable, limit))


def answer_tokens(examples: Sequence[Example]) -> int:
    """Tokens of these samples that are to be learnt."""
    return sum(sum(label != IGNORE for label in example.labels) for example in examples)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which samples each step takes: one seeded permutation per epoch, a pure function of (seed, epoch)."""

    samples: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int

    @staticmethod
    def of(config: RunConfig, samples: int) -> Schedule:
        return Schedule(samples, config.batch_size, config.epochs, config.max_steps, config.seed)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.batch_size)

    @property
    def steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def ending(self) -> str:
        """Which flag ends the run, and what the other would have to be to do so."""
        whole = self.epochs * self.steps_per_epoch
        if self.max_steps is None or self.max_steps == whole:
            return f"ends with --epochs {self.epochs}"
        if self.max_steps < whole:
            share = self.max_steps / self.steps_per_epoch
            return f"ends with --max-steps {self.max_steps}, after {share:.3g} of --epochs {self.epochs}"
        needed = -(-self.max_steps // self.steps_per_epoch)
        return f"ends with --epochs {self.epochs}: --max-steps {self.max_steps} would take --epochs {needed}"

    @property
    def repeats(self) -> bool:
        """Whether a sample is read twice."""
        return self.steps > self.steps_per_epoch

    @property
    def read(self) -> int:
        """Samples that are read at all."""
        return min(self.samples, self.steps * self.batch_size)

    def at(self, step: int) -> tuple[int, list[int]]:
        """Step number (from 0) -> (epoch, sample indices)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        order = _permutation(self.samples, self.seed, epoch)
        return epoch, order[k * self.batch_size : (k + 1) * self.batch_size].tolist()


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
