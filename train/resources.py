"""What the runs of one process share: they are many in a sweep, and load nothing twice."""

from __future__ import annotations

import functools

import torch

from llava_core.language.conversation import Conversation
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.projector.checkpoint import Provenance
from llava_core.shards.folder import open_shards, require_one_encoder
from llava_core.types import JsonDict
from train.config import RunConfig
from train.data.feature_cache import pick_residence, worth_keeping
from train.data.samples import Samples, Schedule
from train.distributed import World
from train.model.packed_model import Prepared, prepare
from train.throughput import peak_memory

EVAL_SEED = 0
"""Of the held-out rows' instructions: the same questions for every run."""


class Shared:
    """Shards, language model, device and kept features, for runs that differ from `config` in other flags.

    `again` says that more runs than one will read the features. Raises LlavaError for shards that do not
    belong together; the language model is loaded when it is first needed.
    """

    def __init__(self, config: RunConfig, world: World, again: bool = False) -> None:
        self.config, self.world, self.again = config, world, again
        self.shards = open_shards(config.features)
        self.held_out_shards = open_shards(config.eval_features) if config.eval_features else []
        require_one_encoder([*self.shards, *self.held_out_shards])
        self.prepared: Prepared | None = None
        """How the language model takes packs, once it is loaded."""
        self.unit = 0
        """Of the rows that it is compiled for (train.data.packing)."""
        self._samples: dict[tuple[bool, int], Samples] = {}

    @functools.cached_property
    def device(self) -> torch.device:
        return self.world.device(self.config.device)

    @functools.cached_property
    def llm(self) -> LanguageModel:
        """Ready to take packs."""
        self.resident  # noqa: B018 (measured before there is a model)
        llm = load_language_model(self.config.llm, self.device)
        self.prepared = prepare(llm, self.config.compile)
        return llm

    @property
    def compiled(self) -> bool:
        """Whether the language model is."""
        return self.prepared is not None and self.prepared.compiled

    @functools.cached_property
    def resident(self) -> int:
        """Bytes that the process held before the language model was loaded."""
        return peak_memory(self.device)

    @functools.cached_property
    def conversation(self) -> Conversation:
        return Conversation(self.llm.tokenizer, self.llm.eos_ids)

    @functools.cached_property
    def provenance(self) -> Provenance:
        return Provenance(self.shards[0].identity, self.llm.identity)

    def samples(self, config: RunConfig) -> tuple[Samples, Samples | None]:
        """The rows a run trains on, and those held out."""
        training = self._rows(config, held_out=False).worded(config.max_text_tokens, config.seed)
        if not self.held_out_shards:
            return training, None
        return training, self._rows(config, held_out=True).worded(config.max_text_tokens, EVAL_SEED)

    def rows(self, config: RunConfig) -> JsonDict:
        """What tells apart the rows that a run trains on, and is judged by."""
        samples, held_out = self.samples(config)
        return {"samples": samples.identity} | ({"held_out": held_out.identity} if held_out else {})

    def keep_features(self, config: RunConfig) -> None:
        """Keep features where --resident says."""
        training = self._rows(config, held_out=False)
        repeated = self.again or Schedule.of(config, len(training)).repeats
        kept = [training] if worth_keeping(config.resident, repeated) else []
        if self.held_out_shards:
            kept.append(self._rows(config, held_out=True))
        kept = [samples for samples in kept if samples.kept is None]
        needed = sum(samples.feature_bytes for samples in kept)
        if kept and (place := pick_residence(config.resident, needed, self.device, self.world.size)):
            for samples in kept:
                samples.keep(place)

    def _rows(self, config: RunConfig, held_out: bool) -> Samples:
        limit = config.eval_samples if held_out else config.max_samples
        if (held_out, limit) not in self._samples:
            shards = self.held_out_shards if held_out else self.shards
            self._samples[held_out, limit] = Samples(
                shards, self.conversation, config.max_text_tokens, limit, config.seed
            )
        return self._samples[held_out, limit]
