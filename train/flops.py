"""Floating-point operations that a training step needs: the numerator of model FLOPs utilisation (MFU).

Counted for the frozen blocks: forward and the gradients of activations, of real tokens alone, with 2
operations per weight and token each, and causal attention; for the vocabulary head the same, where an answer
token is predicted; for what trains also the gradients of its weights. The projector's are counted by torch,
in a pass of one picture. Norms, rotations and activation functions are left out, and so is what gradient
checkpointing computes again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_core.projector.projector import Projector
from train.data.batch import TextCounts


@dataclasses.dataclass(frozen=True)
class Work:
    """The sizes on which the needed operations depend."""

    blocks: int
    """Weights in the matrices of all blocks, LoRA's included."""
    trained: int
    """Those of them that train."""
    attention: int
    """Layers times width of the queries of all heads."""
    head: int
    """Operations per answer token, forward and backward."""
    projector: int
    """Operations per picture, forward and backward."""

    @staticmethod
    def of(model: Any, projector: Projector, tokens: int) -> Work:
        """Sizes of a transformers model, which may be on the meta device, and of a projector.

        What takes gradients of the model trains; `tokens` are the encoder's.
        """
        config = model.config
        layers = [module for module in model.base_model.modules() if not isinstance(module, nn.Embedding)]
        matrices = [p for layer in layers for p in layer.parameters(recurse=False) if p.ndim == 2]
        head = model.get_output_embeddings().weight
        return Work(
            blocks=sum(p.numel() for p in matrices),
            trained=sum(p.numel() for p in matrices if p.requires_grad),
            attention=config.num_hidden_layers * config.num_attention_heads * head_width(config),
            head=(6 if head.requires_grad else 4) * head.numel(),
            projector=projector_operations(projector, tokens),
        )

    def operations(self, counts: TextCounts, visual: int) -> int:
        """Operations of a training step over samples with these texts, `visual` tokens for each picture."""
        visuals = counts.pictures * visual
        # Causal attention: two products of L²/2 scores forward, four backward, 2 operations each.
        squares = visuals * visual + 2 * visual * counts.beside_pictures + counts.squares
        matrices = (4 * self.blocks + 2 * self.trained) * (visuals + counts.tokens)
        return (
            matrices
            + self.head * counts.answers
            + 6 * self.attention * squares
            + self.projector * counts.pictures
        )


def projector_operations(projector: Projector, tokens: int) -> int:
    """Operations of a projector for the `tokens` of one picture, forward and backward."""
    trained = [weight for weight in projector.parameters() if weight.requires_grad]
    features = torch.zeros(1, tokens, projector.config["in_width"], device=trained[0].device)
    # Torch counts no fused attention on a CPU, and gradients of depthwise convolutions as if of others.
    counted = {torch.ops.aten.convolution_backward: _convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        torch.autograd.grad(projector(features).sum(), trained, allow_unused=True)
    return int(counter.get_total_flops())


def _convolution_backward(*shapes: Any, **_: Any) -> int:
    """Operations for a convolution's gradients, by the shapes of aten's arguments: each as forward."""
    grad_out, x, weight, *_bias, transposed, _padding, _groups, output_mask = shapes
    places = math.prod((x if transposed else grad_out)[2:])
    return int(2 * grad_out[0] * places * math.prod(weight) * sum(output_mask[:2]))


def head_width(config: Any) -> int:
    """Width of an attention head; not every model's configuration names it."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)
