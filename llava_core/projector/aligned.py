"""A projector beside the models it was trained between: loaded, and refused beside any others."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.projector.checkpoint import Checkpoint, Provenance, load_checkpoint


def load_aligned(folder: Path, provenance: Provenance) -> Checkpoint:
    """A checkpoint. Raises LlavaError unless it belongs to this encoder and this language model."""
    checkpoint = load_checkpoint(folder)
    checkpoint.provenance.require_encoder(provenance.encoder)
    checkpoint.provenance.require_language_model(provenance.language_model)
    return checkpoint


def load_its_language_model(
    checkpoint: Checkpoint, folder: Path, device: str | torch.device = "cpu", tuned: bool = True
) -> LanguageModel:
    """The language model in `folder`, with what the checkpoint has of it unless `tuned` is false.

    Raises LlavaError unless the checkpoint was trained for it.
    """
    llm = load_language_model(folder, device)
    checkpoint.provenance.require_language_model(llm.identity)
    if tuned:
        checkpoint.tune_model(llm)
    return llm
