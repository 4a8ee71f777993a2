"""Folders of three random models that belong together, and images: all that `infer` needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer.answerer import ImageAnswerer, open_image_answerer
from infer.config import AskConfig
from llava_align.hub.config import ExportConfig
from llava_core.geometry import Fit
from llava_core.language.load import load_language_model
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import build_projector, match_scale
from llava_core.vision.open import open_vision_tower
from tests.support.language_models import QWEN3_TEMPLATE, write_language_model
from tests.support.vision_encoders import write_vision_folder


@dataclasses.dataclass(frozen=True)
class Folders:
    vision: Path
    llm: Path
    checkpoint: Path
    images: list[Path]

    @property
    def flags(self) -> tuple[object, ...]:
        return (
            "--checkpoint",
            self.checkpoint,
            "--vision",
            self.vision,
            "--llm",
            self.llm,
            "--device",
            "cpu",
        )

    def aligned(self) -> ImageAnswerer:
        image = (str(self.images[0]),)
        return open_image_answerer(
            AskConfig(checkpoint=self.checkpoint, vision=self.vision, llm=self.llm, image=image)
        )


def write_aligned(root: Path, template: str = QWEN3_TEMPLATE) -> Folders:
    vision = write_vision_folder(root / "vision")
    llm_folder = write_language_model(root / "llm", template=template)
    tower, llm = open_vision_tower(vision), load_language_model(llm_folder)
    torch.manual_seed(0)
    projector = build_projector("linear", tower.width, llm.hidden)
    # Far larger than a trained one's, so that pictures make a difference to a random model.
    match_scale(projector, torch.randn(64, tower.width), 4 * llm.embedding_rms)
    provenance = Provenance(tower.identity, llm.identity)
    save_checkpoint(root / "run/last", projector, provenance, {}, {}, {})
    images = []
    for seed in range(5):
        path = root / f"{seed}.png"
        pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(path)
        images.append(path)
    return Folders(vision, llm_folder, root / "run/last", images)


def write_checkpoint(
    folder: Path,
    vision: Path,
    llm_folder: Path,
    kind: str,
    visual_tokens: str,
    layer: int | None,
    decode: str,
    fit: Fit | None = None,
    feature_norm: str = "none",
) -> ExportConfig:
    """A random projector between them, at the scale of the model's words."""
    tower = open_vision_tower(vision, layer=layer, decode=decode, fit=fit)
    llm = load_language_model(llm_folder)
    torch.manual_seed(1)
    projector = build_projector(kind, tower.width, llm.hidden, visual_tokens, feature_norm=feature_norm)
    for measured in projector.buffers():
        measured.normal_()
    match_scale(projector, torch.randn(4, tower.tokens, tower.width), llm.embedding_rms)
    provenance = Provenance(tower.identity, llm.identity)
    save_checkpoint(folder, projector, provenance, {"lr": 0.1}, {"eval_loss": 1.25}, {})
    return ExportConfig(checkpoint=folder, vision=vision, llm=llm_folder, out=folder.with_name("exported"))
