"""What runs share, loaded once: feature shards, language model, device and cached features."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from llava_core.identity import EncoderIdentity
from llava_core.input_folders import folders_of
from llava_core.language.load import load_language_model, outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.projector.checkpoint import Provenance
from llava_core.shards.folder import require_one_encoder
from llava_core.shards.row_list import read_row_list
from llava_core.types import JsonDict
from train.config import ALL_ROWS, RunConfig
from train.data.feature_cache import pick_residence, worth_caching
from train.data.packing import UNBOUNDED, Packing
from train.data.samples import Samples
from train.data.schedule import Schedule
from train.data.sources import Source, open_sources, reworded
from train.distributed import ProcessGroup
from train.model.packed_model import Prepared, prepare
from train.throughput import peak_memory
from train.tuning import Tuning

if TYPE_CHECKING:
    from train.cost_prediction import Prediction

EVAL_SEED = 0
"""Seed of the held-out rows' instructions: runs with the same ones are asked the same questions."""
ROW_UNIT = 128
"""Rows of a compiled model are padded to multiples of this many tokens, the size of its matrix tiles."""


class TrainingResources:
    """For `config`, and for runs that differ from it in flags that leave data and models as they are.

    `repeated`: several runs will read the features. Without `weights` the language model is an outline, which
    is enough to plan. `trained` has the order of the encoders of --fuse, by default that of --features.
    Raises LlavaError for shards of unlike encoders; the model is loaded when first needed.
    """

    def __init__(
        self,
        config: RunConfig,
        group: ProcessGroup | None = None,
        repeated: bool = False,
        weights: bool = True,
        trained: EncoderIdentity | None = None,
    ) -> None:
        self.config, self.group = config, group or ProcessGroup()
        self.repeated, self.weights = repeated, weights
        self._opened: dict[Hashable, tuple[list[Source], list[Source]]] = {}
        self.use(config, trained)
        self.device = self.group.device(config.device)
        self.memory_before = peak_memory(self.device)
        """Bytes that the process held before the language model was loaded."""
        self.prepared: Prepared | None = None
        """How the language model takes packs, once it is loaded."""
        self.predictions: dict[Hashable, Prediction] = {}
        """What runs of each kind take (TrainingRun.predicted)."""
        self._tuning: Tuning | None = None
        self._samples: dict[Hashable, Samples] = {}

    def use(self, config: RunConfig, trained: EncoderIdentity | None = None) -> None:
        """Let `shards` be those of `config`: runs of a sweep may have a cache each, which stay open."""
        key = config.features, config.eval_features, config.fuse
        if key not in self._opened:
            sources = open_sources(folders_of(config.features), config.fuse, trained)
            like = sources[0].shards[0].identity
            held_out = open_sources(folders_of(config.eval_features), config.fuse, like, "--eval-features")
            require_one_encoder([shard for source in [*sources, *held_out] for shard in source.shards])
            self._opened[key] = sources, held_out
        self.sources, self.held_out_sources = self._opened[key]
        self.shards = [shard for source in self.sources for shard in source.shards]
        self.held_out_shards = [shard for source in self.held_out_sources for shard in source.shards]

    @functools.cached_property
    def llm(self) -> LanguageModel:
        """The language model, ready to take packs; without weights its outline on the meta device."""
        if not self.weights:
            return outline_language_model(self.config.llm)
        llm = load_language_model(self.config.llm, self.device)
        self.prepared = prepare(llm, self.config.compile, self.config.gradient_checkpointing)
        return llm

    def tune(self, config: RunConfig) -> Tuning:
        """What a run trains of `llm`, which no longer has what the run before trained of it."""
        before, self._tuning = self._tuning, None
        if before is not None:
            before.remove()
            if before.kind == "llm":
                del self.llm  # to be loaded again
        del before  # else its weights stay until those are loaded
        self._tuning = Tuning(config, self.llm)
        return self._tuning

    @property
    def compiled(self) -> bool:
        """Whether the language model is loaded and compiled."""
        return self.prepared is not None and self.prepared.compiled

    @functools.cached_property
    def conversation(self) -> Conversation:
        return Conversation(self.llm.tokenizer, self.llm.eos_ids)

    @property
    def provenance(self) -> Provenance:
        return Provenance(self.shards[0].identity, self.llm.identity)

    def samples(self, config: RunConfig) -> tuple[Samples, Samples | None]:
        """The rows that a run trains on, and those held out; without a picture only if the language model
        trains."""
        tokens, instructions = config.max_text_tokens, config.instructions
        training = self._rows(config, held_out=False).with_text_options(tokens, config.seed, instructions)
        if not self.held_out_shards:
            return training, None
        held_out = self._rows(config, held_out=True)
        return training, held_out.with_text_options(tokens, EVAL_SEED, instructions).remember()

    def rows(self, config: RunConfig) -> JsonDict:
        """Identities of the rows that a run trains on, and of those it is judged by."""
        samples, held_out = self.samples(config)
        identities: JsonDict = {"samples": samples.identity}
        if samples.listed is not None:
            identities["row_list"] = samples.listed.sha256
        return identities | ({"held_out": held_out.identity} if held_out else {})

    def cache_features(self, config: RunConfig) -> None:
        """Let features stay where --resident says, from when they are first read."""
        training = self._rows(config, held_out=False)
        repeated = self.repeated or Schedule.of(config, training.sizes).repeats
        cached = [training] if worth_caching(config.resident, repeated) else []
        for other in self._samples.values():
            if other.drawn_by is not None and other is not training:
                other.cache = None  # no later run need have rows that were drawn for an earlier one
        if self.held_out_shards:
            cached.append(self._rows(config, held_out=True))
        cached = [samples for samples in cached if samples.cache is None]
        needed = sum(samples.feature_bytes for samples in cached)
        if cached and (place := pick_residence(config.resident, needed, self.device, self.group.size)):
            for samples in cached:
                samples.cache_on(place)

    def packing(self, micro_tokens: int, room: int = UNBOUNDED) -> Packing:
        """How steps are laid out, in passes of at most this many tokens; `room` as in Packing."""
        return Packing(micro_tokens, ROW_UNIT if self.compiled else 1, self.llm.context, room)

    def _rows(self, config: RunConfig, held_out: bool) -> Samples:
        limit = config.eval_samples if held_out else config.max_samples
        self.use(config)
        tunes, words = config.tune != "projector", config.eval_text if held_out else config.text
        folders = config.eval_features if held_out else config.features
        drawn_by = config.seed if config.subset == "random" and not held_out else None
        listed = ALL_ROWS if held_out else config.rows
        key = folders, config.fuse, held_out, limit, tunes, words, drawn_by, listed
        if key not in self._samples:
            sources = self.held_out_sources if held_out else self.sources
            if words is not None:
                sources = reworded(sources, words)
            shards = [shard for source in sources for shard in source.shards]
            row_list = None if listed == ALL_ROWS else read_row_list(Path(listed))
            if row_list is not None:
                row_list.require_of(shards)
            self._samples[key] = Samples(
                *(shards, self.conversation, config.max_text_tokens, limit, config.seed),
                *(config.instructions, tunes, sources, drawn_by, row_list),
            )
        return self._samples[key]
