"""The encoder that a projector was trained on, opened as it was then."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_core.projector.checkpoint import Provenance
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower


def open_trained_tower(folder: Path, trained: Provenance, device: str | torch.device = "cpu") -> VisionTower:
    """The encoder as a projector was trained on it. Raises LlavaError if `folder` holds another."""
    layer = trained.encoder.encoder.get("layer")
    decode = trained.encoder.preprocess.get("decode", "draft")
    tower = open_vision_tower(folder, device, layer=layer, decode=decode)
    trained.require_encoder(tower.identity)
    return tower
