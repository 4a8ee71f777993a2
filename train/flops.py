"""The operations that aligning needs, by which a machine's use is judged.

Of the frozen blocks: forward and the gradients of activations, of real tokens alone; 2 operations per weight
and token each, and causal attention. Of the vocabulary head the same, where an answer token is predicted. Of
the projector also the gradients of its weights. Norms, rotations and activation functions are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Work:
    """The sizes on which the needed operations depend."""

    blocks: int
    """Weights in the matrices of all blocks."""
    attention: int
    """Layers times width of the queries of all heads."""
    head: int
    """Weights of the vocabulary head."""
    projector: int
    """Operations per visual token, forward and backward."""

    @staticmethod
    def of(model: Any, projector: nn.Module) -> Work:
        """From a transformers model, which may be on the meta device, and the projector."""
        config = model.config
        layers = [module for module in model.base_model.modules() if not isinstance(module, nn.Embedding)]
        matrices = [p.numel() for m in layers for p in m.parameters(recurse=False) if p.ndim == 2]
        linear = [weight.numel() for weight in projector.parameters() if weight.dim() > 1]
        return Work(
            blocks=sum(matrices),
            attention=config.num_hidden_layers * config.num_attention_heads * head_width(config),
            head=model.get_output_embeddings().weight.numel(),
            projector=6 * sum(linear) - 2 * sum(linear[:1]),  # the features take no gradient
        )

    def operations(self, lengths: Sequence[int], visual: int, answers: int) -> int:
        """Of a training step over samples of so many tokens, with so many visual and answer tokens in all."""
        # Causal attention: two products of L²/2 scores forward, four backward, 2 operations each.
        attention = 6 * self.attention * sum(length * length for length in lengths)
        matrices = 4 * (self.blocks * sum(lengths) + self.head * answers)
        return matrices + attention + self.projector * visual


def head_width(config: Any) -> int:
    """Of each attention head; not every model's configuration names it."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)
