"""Rows of feature shards as training samples: which are usable, and the features and text of each."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import torch

from llava_core.errors import LlavaError
from llava_core.language.instructions import default_question, instructions_for, pick_instruction
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Example, Turn
from llava_core.shards.reader import Shard
from llava_core.shuffled_pairs import picture_numbers
from train.data.feature_cache import FeatureCache

READ_FOR_LANGUAGE = 512
"""Captions, evenly spaced, by which the default question's language is chosen."""


@dataclasses.dataclass(frozen=True)
class TextCounts:
    """Sums over the texts of some samples: what throughput and needed operations are computed from."""

    samples: int
    tokens: int
    """Text tokens."""
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
            sum(lengths),
            sum(length * length for length in lengths),
            answer_tokens(examples),
            sum(example.cut for example in examples),
            sum(example.dropped for example in examples),
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Features fp16 [samples, T, D], on the CPU or where they are cached, and the text of each sample."""

    features: torch.Tensor
    examples: list[Example]
    counts: TextCounts
    error: Exception | None = None
    """Why there are no samples in it, although there should be."""

    def to(self, device: torch.device) -> Batch:
        return dataclasses.replace(self, features=self.features.to(device, non_blocking=True))


class Samples:
    """Every usable row (status ok, caption not empty) of some shards, up to `limit` of them."""

    def __init__(
        self,
        shards: Sequence[Shard],
        conversation: Conversation,
        max_text_tokens: int,
        limit: int,
        seed: int,
        instructions: str = "auto",
    ) -> None:
        """`instructions` are what `read_instructions` returns."""
        self.shards = list(shards)
        self.conversation = conversation
        self.max_text_tokens = max_text_tokens
        self.seed, self.instructions = seed, instructions
        self.cache: FeatureCache | None = None
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
    def location(self) -> str:
        """Where features are read from after the first time."""
        return "from disk" if self.cache is None else f"kept on {self.cache.features.device}"

    @property
    def feature_bytes(self) -> int:
        """Bytes of all samples' features, as fp16."""
        return len(self) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's features, as fp16."""
        return self.tokens * self.shards[0].width * 2

    @functools.cached_property
    def pictures(self) -> list[int]:
        """The number of each sample's picture (llava_core.shuffled_pairs): several samples may show one."""
        return picture_numbers(self.shards[shard].picture_keys(row) for shard, row in self.rows)

    @property
    def identity(self) -> str:
        """sha256, in hex, over which rows of which shards these are."""
        used = [(shard.path.name, shard.layout.uid) for shard in self.shards]
        return hashlib.sha256(json.dumps([used, self.rows]).encode()).hexdigest()

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The samples at `indices`."""
        examples = [self.example(index, epoch) for index in indices]
        return Batch(self.features(indices), examples, TextCounts.of(examples))

    def features(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of the samples at `indices`, from disk or the cache: fp16 [samples, T, D]."""
        return self.read(indices) if self.cache is None else self.cache.take(indices, self.read)

    def with_text_options(self, max_text_tokens: int, seed: int, instructions: str) -> Samples:
        """The same rows and feature cache, with another budget of answer tokens and other instructions."""
        samples = copy.copy(self)
        samples.max_text_tokens, samples.seed, samples.instructions = max_text_tokens, seed, instructions
        return samples

    def default_question(self) -> str:
        """What a projector trained on these is asked by default."""
        read = self.rows[:: -(-len(self.rows) // READ_FOR_LANGUAGE)]
        answers = [self.shards[shard].turns(row)[0][1] for shard, row in read]
        return default_question(self.instructions, answers)

    def first_question(self, index: int) -> tuple[str, str]:
        """A sample's first question, of several instructions the first, and its answer."""
        shard, row = self.rows[index]
        question, answer = self.shards[shard].turns(row)[0]
        return instructions_for(self.instructions, answer)[0] if question is None else question, answer

    def cache_on(self, device: torch.device) -> None:
        """Keep features on `device` from when they are first read."""
        self.cache = FeatureCache((len(self), self.tokens, self.shards[0].width), device)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of the samples at `indices` from disk: fp16 [samples, T, D] on the CPU."""
        features = torch.empty(len(indices), self.tokens, self.shards[0].width, dtype=torch.float16)
        rows = features.numpy()
        for k, index in enumerate(indices):
            shard, row = self.rows[index]
            self.shards[shard].read_into(row, rows[k])
        return features

    def text_bytes(self, index: int) -> int:
        """Bytes of one sample's text: about in proportion to its tokens, and known without reading it."""
        shard, row = self.rows[index]
        return self.shards[shard].caption_bytes(row)

    def example(self, index: int, epoch: int) -> Example:
        """Token ids and labels of one sample; an instruction is drawn by (seed, epoch, row, turn) alone."""
        s, row = self.rows[index]
        shard = self.shards[s]
        key = f"{epoch}/{shard.path.stem}/{row}"
        turns = []
        for k, (question, answer) in enumerate(shard.turns(row)):
            if question is None:
                known = instructions_for(self.instructions, answer)
                question = pick_instruction(self.seed, f"{key}/{k}" if k else key, known)
            turns.append(Turn(question, answer))
        return self.conversation.example(turns, self.max_text_tokens)


def usable_rows(shards: Sequence[Shard], limit: int) -> list[tuple[int, int]]:
    """(shard, row) of the first `limit` rows with features and a caption, in the order of shards and rows."""
    usable = (
        (s, row) for s, shard in enumerate(shards) for row in shard.ok_rows() if shard.caption(row).strip()
    )
    return list(itertools.islice(usable, limit))


def answer_tokens(examples: Sequence[Example]) -> int:
    """Number of target tokens: those the loss falls on."""
    return sum(sum(label != IGNORE for label in example.labels) for example in examples)
