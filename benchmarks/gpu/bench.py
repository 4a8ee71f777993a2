"""What several sections measure with: models, features and pictures, on memory-backed disk, made once."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Row
from benchmarks.photo_server import photo, with_comment
from llava_align.config import MODELS
from llava_align.synthetic_reference import write_features, write_language_model, write_vision
from llava_core.device import pick_device
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower
from train.config import Compile, RunConfig
from train.data.batch import Batch
from train.data.samples import Samples
from train.resources import TrainingResources


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int
    """Of features to train on."""
    held_out: int
    steps: int
    """Of a whole run, end to end."""
    passes: int
    """Steps of one pass where several trainers take turns."""
    pictures: int
    picture: tuple[int, int]
    """Width and height."""
    batches: tuple[int, ...]
    """Sequences decoded at once."""
    new_tokens: int
    together: tuple[int, ...]
    clients: int
    tokens: tuple[int, ...]
    """Tokens in one pass through the language model."""
    matmul: int


SIZES = {
    "reference": Sizes(2048, 128, 400, 8, 256, (2250, 1500), (1, 16, 64), 64, (1, 4, 16), 64,
                       (1024, 4096, 16_384, 65_536), 8192),
    "small": Sizes(64, 8, 4, 2, 8, (96, 64), (1, 2), 4, (1, 2), 3, (256, 512), 256),
}  # fmt: skip


BATCH = {"reference": 16, "small": 4}
"""Samples of a training step."""


class Bench:
    """The reference's shapes with random weights, or with `small` the demo's models."""

    def __init__(self, shape: str, folder: Path) -> None:
        self.shape, self.folder, self.sizes = shape, folder, SIZES[shape]
        self.device = pick_device("auto")
        reference = shape == "reference"
        self.vision = folder / "vision" if reference else MODELS / "vision"
        self.llm_folder = folder / "llm" if reference else MODELS / "llm"
        self.features, self.held_out = folder / "features", folder / "held-out"
        self.ceilings: dict[str, float] = {}
        """What `ceilings` measured: matmul, in operations per second, and copy, in bytes per second."""
        self._made = 0

    def setup(self) -> Iterator[Row]:
        began = time.monotonic()
        if self.shape == "reference":
            write_vision(self.vision)
            write_language_model(self.llm_folder)
        preprocess = self.tower.preprocess.to_json()
        for seed, (path, rows) in enumerate(
            ((self.features, self.sizes.rows), (self.held_out, self.sizes.held_out))
        ):
            path.mkdir()
            write_features(path / "a.h5", rows, self.tower.encoder, preprocess, seed)
        yield Row("models and features written", time.monotonic() - began, "s", note=str(self.folder.parent))

    @functools.cached_property
    def tower(self) -> VisionTower:
        return open_vision_tower(self.vision, self.device)

    @functools.cached_property
    def llm(self) -> LanguageModel:
        """With attention of its own, for whatever generates."""
        return load_language_model(self.llm_folder, self.device)

    @functools.cached_property
    def pictures(self) -> list[bytes]:
        """JPEGs such as SA-1B's, few of which differ in more than a comment."""
        drawn = [photo(*self.sizes.picture, seed) for seed in range(4)]
        return [with_comment(drawn[i % 4], i) for i in range(self.sizes.pictures)]

    def config(self, **flags: Any) -> RunConfig:
        """Of a run in a new folder."""
        self._made += 1
        given = RunConfig(features=self.features, llm=self.llm_folder, out=self.folder / f"run-{self._made}")
        settings: dict[str, Any] = {"epochs": 1000, "eval_captions": 0, **flags}
        return dataclasses.replace(given, **settings)

    def resources(self, compiled: Compile) -> TrainingResources:
        """The language model ready for packs, each kind once: runs may share it."""
        if compiled not in self._resources:
            self._resources[compiled] = TrainingResources(self.config(compile=compiled), repeated=True)
        return self._resources[compiled]

    @functools.cached_property
    def _resources(self) -> dict[Compile, TrainingResources]:
        return {}

    def samples(self, compiled: Compile = "off") -> Samples:
        return self.resources(compiled).samples(self.config())[0]

    def batch(self, samples: int) -> Batch:
        """The first N samples, or the same again if there are fewer."""
        rows = self.samples()
        return rows.batch([i % len(rows) for i in range(samples)], epoch=0)

    def conversation(self) -> Conversation:
        return Conversation(self.llm.tokenizer, self.llm.eos_ids)

    def forget(self) -> None:
        """Free the device's memory, after a section that failed."""
        for name in ("llm", "tower", "_resources"):
            vars(self).pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
