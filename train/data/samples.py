"""Rows of feature shards as training samples: which are usable, and the features and text of each."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from llava_core.cli.console import counted, say_once
from llava_core.errors import LlavaError
from llava_core.language.instructions import default_question, instructions_for, pick_instruction
from llava_core.language.prompt_and_labels import Conversation, Example, Turn
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.row_list import RowList
from llava_core.shuffled_pairs import picture_numbers
from train.data.batch import Batch, TextCounts
from train.data.feature_cache import FeatureCache
from train.data.sources import Source, rows_identity, text_only_rows, usable_rows

REMEMBERED = 1 << 14
"""Most samples whose token ids are kept."""
BYTES_PER_TOKEN = 4
"""Bytes of text that a visual token counts as, where samples are weighed."""
READ_FOR_LANGUAGE = 512
"""Captions, evenly spaced, by which the default question's language is chosen."""


class Samples:
    """Every usable row (status ok, caption not empty) of some sources, up to `limit` of each.

    With `text`, rows without a picture (status text only) are among them.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        conversation: Conversation,
        max_text_tokens: int,
        limit: int,
        seed: int,
        instructions: str = "auto",
        text: bool = False,
        sources: Sequence[Source] = (),
        drawn_by: int | None = None,
        listed: RowList | None = None,
    ) -> None:
        """`instructions` are what `read_instructions` returns; `sources` those of the shards, if several;
        `listed` keeps some of their rows. `drawn_by` is a seed that draws the `limit` rows of each; without
        it they are the first.

        Raises LlavaError if a source has no usable row, none of them a picture, or the chat template refuses
        the system message of one.
        """
        self.shards, self.text, self.limit, self.listed = list(shards), text, limit, listed
        self.sources = list(sources) or [Source(Path(), "", self.shards)]
        self.conversation = conversation
        self.max_text_tokens = max_text_tokens
        self.seed, self.instructions = seed, instructions
        self.drawn_by = drawn_by
        self.cache: FeatureCache | None = None
        rows: list[np.ndarray] = []
        self.sizes: list[int] = []
        """Samples of each source."""
        before, has_system = 0, False
        for source in self.sources:
            own, system = usable_rows(source.shards, limit, text, drawn_by, listed)
            has_system |= system
            if not len(own):
                paths = [source.path] if len(self.sources) > 1 else [shard.path for shard in source.shards]
                raise LlavaError(
                    f"no usable row in {', '.join(map(str, paths))}",
                    expected="rows with features and a caption" + (f", in {listed.path}" if listed else ""),
                    do="--tune lora or llm trains on rows without an image"
                    if text_only_rows(source.shards)
                    else "look at the failures with `extract inspect`",
                )
            rows.append(own + np.array([before, 0], own.dtype))
            self.sizes.append(len(own))
            before += len(source.shards)
        self.rows = np.concatenate(rows)
        """(shard, row) of each sample, int [samples, 2], those of one source together."""
        self.with_picture = np.arange(len(self))
        """Indices of the samples that have one, ascending."""
        if text:
            shown = [self.shards[shard].status[row] == Status.OK for shard, row in self.rows]
            self.with_picture = np.flatnonzero(shown)
        if not len(self.with_picture):
            raise LlavaError(
                f"no row with an image in {', '.join(str(shard.path) for shard in self.shards)}",
                do="add a folder that has some",
            )
        if has_system and not conversation.writes_system_messages():
            say_once("the chat template writes no system messages: those of the data have no effect")

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
    def left_out(self) -> int:
        """Rows without a picture that are no samples, as the language model does not train."""
        return 0 if self.text else text_only_rows(self.shards)

    @property
    def share_with_picture(self) -> float:
        return len(self.with_picture) / len(self)

    @property
    def feature_bytes(self) -> int:
        """Bytes of all samples' features, as fp16."""
        return len(self.with_picture) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample's features, as fp16."""
        return self.tokens * self.shards[0].width * 2

    @functools.cached_property
    def pictures(self) -> list[int]:
        """The number of each sample's picture (llava_core.shuffled_pairs), which several samples may show."""
        return picture_numbers(self.shards[shard].picture_keys(row) for shard, row in self.rows.tolist())

    @property
    def identity(self) -> str:
        """sha256, in hex, over which rows of which shards these are, and of several sources of which."""
        return rows_identity(self.shards, self.rows, self.sizes)

    @property
    def identity_with_picture(self) -> str:
        """`identity` of the rows with a picture."""
        return rows_identity(self.shards, self.rows[self.with_picture], self.sizes)

    @property
    def pictures_identity(self) -> str:
        """sha256, in hex, over the pictures and words of the rows with a picture, whatever encoded them."""
        digest = hashlib.sha256()
        for shard, row in self.rows[self.with_picture].tolist():
            own = self.shards[shard]
            digest.update(repr([own.picture_keys(row), own.id(row), own.caption(row)]).encode())
        return digest.hexdigest()

    def place(self, index: int) -> tuple[int, int]:
        """Number of a sample's shard, and its row there."""
        shard, row = self.rows[index].tolist()
        return shard, row

    def has_picture(self, index: int) -> bool:
        shard, row = self.place(index)
        return bool(self.shards[shard].status[row] == Status.OK)

    def by_source(self) -> Iterator[tuple[str, range]]:
        """Each source's name and its samples' indices."""
        for source, size, end in zip(self.sources, self.sizes, itertools.accumulate(self.sizes), strict=True):
            yield source.name, range(end - size, end)

    def described(self, shares: Sequence[float] | None = None) -> list[str]:
        """Lines of the log: the sources, if there are several, and which rows are left out."""
        lines, shown = [], self.share_with_picture
        if len(self.sizes) > 1:
            parts = zip(self.sources, self.sizes, shares or [0.0] * len(self.sizes), strict=True)
            listed = (
                f"{source.name} {size} samples" + (f", {share:.1%} of those drawn" if share else "")
                for source, size, share in parts
            )
            lines.append(f"sources: {'; '.join(listed)}")
        if shown < 1:
            lines.append(f"{len(self) - len(self.with_picture)} samples without an image are trained as text")
        encoded = sum(int((shard.status == Status.OK).sum()) for shard in self.shards)
        usable = encoded + self.text * text_only_rows(self.shards)
        if self.listed is not None:
            kept = sum(len(self.listed.rows_of(shard)) for shard in self.shards)
            lines.append(f"{kept:,} of {usable:,} rows: --rows {self.listed.path} keeps these")
            if unlisted := [shard for shard in self.shards if not self.listed.shards.keys() & shard.uids]:
                which = f"{counted(len(unlisted), 'shard')}, such as {unlisted[0].path.name}"
                lines.append(f"left out: {which}, of which that list has no row")
            usable = min(usable, kept)
        if self.limit in self.sizes and usable > len(self):
            which = f"the first {self.limit:,}"
            if self.drawn_by is not None:
                which = f"{self.limit:,}, drawn by --seed {self.drawn_by},"
            lines.append(f"{len(self):,} of {usable:,} rows: --max-samples takes {which} of a folder")
        if self.left_out:
            rows = counted(self.left_out, "row")
            lines.append(
                f"{rows} without an image left out: they train the language model (--tune lora, llm)"
            )
        return lines

    def batch(self, indices: Sequence[int], epoch: int | Sequence[int]) -> Batch:
        """The samples at `indices`, in one epoch or in one each."""
        epochs = [epoch] * len(indices) if isinstance(epoch, int) else epoch
        examples = [self.example(index, own) for index, own in zip(indices, epochs, strict=True)]
        return Batch(self.features(indices), examples, TextCounts.of(examples))

    def features(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of those of the samples at `indices` that have a picture, from disk or the cache: fp16
        [samples, T, D]."""
        shown = [index for index in indices if self.has_picture(index)] if self.text else indices
        if self.cache is None:
            return self.read(shown)
        if len(self.with_picture) == len(self):
            return self.cache.take(shown, self.read)
        places = np.searchsorted(self.with_picture, shown).tolist()
        return self.cache.take(places, lambda some: self.read([self.with_picture[place] for place in some]))

    def with_text_options(self, max_text_tokens: int, seed: int, instructions: str) -> Samples:
        """The same rows and feature cache, with another budget of answer tokens and other instructions."""
        samples = copy.copy(self)
        samples.max_text_tokens, samples.seed, samples.instructions = max_text_tokens, seed, instructions
        return samples

    def remember(self) -> Samples:
        """Keep each sample's token ids from when they are first asked for: about 5 KB for 100 tokens."""
        self.example = functools.lru_cache(REMEMBERED)(self.example)  # type: ignore[method-assign]
        return self

    def default_question(self) -> str:
        """What a projector trained on these is asked by default."""
        read = self.with_picture[:: -(-len(self.with_picture) // READ_FOR_LANGUAGE)]
        answers = [self.shards[shard].turns(row)[0][1] for shard, row in self.rows[read].tolist()]
        return default_question(self.instructions, answers)

    def first_question(self, index: int) -> tuple[str, str, str | None]:
        """A sample's first question, of several instructions the first; its answer; its system message."""
        shard, row = self.place(index)
        dialogue = self.shards[shard].dialogue(row)
        question, answer = dialogue.turns[0]
        asked = instructions_for(self.instructions, answer)[0] if question is None else question
        return asked, answer, dialogue.system

    def cache_on(self, device: torch.device) -> None:
        """Keep features on `device` from when they are first read."""
        self.cache = FeatureCache((len(self.with_picture), self.tokens, self.shards[0].width), device)

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Features of samples with a picture, at `indices`, from disk: fp16 [samples, T, D] on the CPU."""
        features = torch.empty(len(indices), self.tokens, self.shards[0].width, dtype=torch.float16)
        rows = features.numpy()
        for k, index in enumerate(indices):
            shard, row = self.place(index)
            self.shards[shard].read_into(row, rows[k])
        return features

    def text_bytes(self, index: int) -> int:
        """Bytes of one sample's text: about in proportion to its tokens, and known without reading it."""
        shard, row = self.place(index)
        return self.shards[shard].caption_bytes(row)

    def weight(self, index: int) -> int:
        """About in proportion to a sample's tokens, visual ones included, and known without reading it."""
        return self.text_bytes(index) + BYTES_PER_TOKEN * self.tokens * self.has_picture(index)

    def example(self, index: int, epoch: int) -> Example:
        """Token ids and labels of one sample; an instruction is drawn by (seed, epoch, row, turn) alone."""
        s, row = self.place(index)
        shard = self.shards[s]
        key = f"{epoch}/{shard.path.stem}/{row}"
        turns, dialogue = [], shard.dialogue(row)
        for k, (question, answer) in enumerate(dialogue.turns):
            if question is None:
                known = instructions_for(self.instructions, answer)
                question = pick_instruction(self.seed, f"{key}/{k}" if k else key, known)
            turns.append(Turn(question, answer))
        example = self.conversation.example(turns, self.max_text_tokens, dialogue.system)
        return example if self.has_picture(index) else dataclasses.replace(example, picture=False)
