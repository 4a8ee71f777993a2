"""The loss of one pack by itself."""

from __future__ import annotations

import torch

from llava_core.language.model import LanguageModel
from train.data.packing import Pack, Packing
from train.model.loss import packed_losses


def summed_loss(llm: LanguageModel, projector: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """Log loss in nats of a pack's answer tokens, summed: a scalar in fp32."""
    (loss,) = packed_losses(llm, [projector], Packing(sum(pack.lengths)).row([(0, pack)]))
    return loss
