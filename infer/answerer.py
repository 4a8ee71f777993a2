"""From image and question to answer: live encoder, projector, frozen language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from infer.config import Aligned, LiveOrStored, Models
from llava_core.cli.console import say
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from llava_core.input_folders import config_of, folders_of, require_checkpoint
from llava_core.language.generate import generate
from llava_core.language.instructions import QUESTION
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import Sampling
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import Checkpoint, load_checkpoint
from llava_core.projector.projector import Projector
from llava_core.shards.folder import open_shards
from llava_core.shards.fused import FusedShard, open_fused
from llava_core.shards.reader import Shard
from llava_core.vision.fused import FusedTower, open_trained_towers
from llava_core.vision.preprocess import Decoded
from llava_core.vision.tower import VisionTower


class FeatureAnswerer:
    """A projector and its language model: features to text."""

    def __init__(self, projector: Projector, llm: LanguageModel, question: str = QUESTION) -> None:
        """`question` is what is asked by default."""
        self.projector, self.llm, self.question = projector.to(llm.device), llm, question
        self.conversation = Conversation(llm.tokenizer, llm.eos_ids)

    @torch.inference_mode()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features [images, tokens, width] -> visual tokens [images, T, hidden]."""
        # Through fp16, as the features the projector was trained on.
        visual: torch.Tensor = self.projector(features.half().float().to(self.llm.device))
        return visual.to(self.llm.dtype)

    def generate(
        self, embedded: torch.Tensor, sampling: Sampling, stopped: Callable[[int], bool], seeds: Sequence[int]
    ) -> Iterator[list[int | None]]:
        """`llava_core.language.generate` with this language model."""
        return generate(self.llm, embedded, sampling, stopped=stopped, seeds=seeds)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids -> embeddings [1, L, hidden]."""
        return self.llm.embed(torch.tensor(list(ids), dtype=torch.long, device=self.llm.device)[None])

    def text(self, ids: Sequence[int]) -> str:
        return self.conversation.text(ids)


class ImageAnswerer(FeatureAnswerer):
    """Encoder, projector and language model that were trained together."""

    def __init__(
        self,
        tower: VisionTower | FusedTower,
        projector: Projector,
        llm: LanguageModel,
        question: str = QUESTION,
    ) -> None:
        super().__init__(projector, llm, question)
        self.tower = tower

    def encode_files(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded image files -> visual tokens [images, T, hidden]. Raises ImageError."""
        return self.encode_images([self.decode(image) for image in images])

    def decode(self, image: bytes) -> Decoded:
        """An encoded image file -> the pixels that the encoder takes. Raises ImageError."""
        return self.tower.decode(image)

    def encode_images(self, images: Sequence[Decoded]) -> torch.Tensor:
        """Pixels -> visual tokens [images, T, hidden]."""
        return self.project(self.tower.encode_images(images))


def open_image_answerer(config: Models | LiveOrStored) -> ImageAnswerer:
    """Load the three models. Raises LlavaError if the projector was trained for others."""
    assert config.vision is not None
    checkpoint, device = load_checkpoint(config.checkpoint), pick_device(config.device)
    tower = open_trained_towers(config.vision, checkpoint.provenance, device)
    llm = _language_model(config, checkpoint, tower.name, device)
    return ImageAnswerer(tower, checkpoint.projector, llm, checkpoint.provenance.question)


def open_second_answerer(folder: Path, first: ImageAnswerer, config: Models) -> ImageAnswerer:
    """Another checkpoint's models beside those of `config`, which are `first`.

    They share the encoder, and the language model unless stage 2 tuned it in either. Raises LlavaError for a
    checkpoint of other models, or the same one.
    """
    require_checkpoint(folder)
    if folder.resolve() == config.checkpoint.resolve():
        raise LlavaError(f"{folder} is the checkpoint that answers already", do="name another one")
    checkpoint, trained = load_checkpoint(folder), config_of(config.checkpoint)
    checkpoint.provenance.require_encoder(first.tower.identity)
    tuned = config.adapter != "none" and (checkpoint.tune or trained.get("tune"))
    if tuned:
        llm = _language_model(config, checkpoint, first.tower.name, first.llm.device)
    else:
        checkpoint.provenance.require_language_model(first.llm.identity)
        llm = first.llm
    return ImageAnswerer(first.tower, checkpoint.projector, llm, checkpoint.provenance.question)


def open_asked_shards(config: LiveOrStored) -> list[Shard]:
    """The shards of --features, fused as the projector was trained. Raises LlavaError for too few folders."""
    folders = folders_of(config.features)
    trained = load_checkpoint(config.checkpoint).provenance.encoder
    if trained.fusion:
        return open_fused(folders, trained.fusion.kind, trained)
    if len(folders) > 1:
        expected = "one folder, or a shard of it"
        raise LlavaError(
            f"--features: this projector was trained on {trained} alone", expected=expected, got=len(folders)
        )
    return open_shards(folders[0])


def open_feature_answerer(config: Aligned, shard: Shard) -> FeatureAnswerer:
    """Load projector and language model for a shard's features. Raises LlavaError if they do not fit."""
    checkpoint = load_checkpoint(config.checkpoint)
    checkpoint.provenance.require_encoder(shard.identity)
    parts = shard.parts if isinstance(shard, FusedShard) else (shard,)
    source = " + ".join(str(part.path.parent) for part in parts)
    llm = _language_model(config, checkpoint, source, pick_device(config.device))
    return FeatureAnswerer(checkpoint.projector, llm, checkpoint.provenance.question)


def _language_model(
    config: Aligned, checkpoint: Checkpoint, source: str, device: torch.device
) -> LanguageModel:
    tuned = config.adapter != "none"
    llm = load_its_language_model(checkpoint, config.llm, device, tuned)
    llm.new_cache()  # raises for a model that cannot generate here
    stage2 = f", {'as tuned' if tuned else 'not as tuned'} with --tune {checkpoint.tune}"
    say(f"{source} → {checkpoint.folder} → {llm.id}{stage2 if checkpoint.tune else ''} on {device}")
    return llm
