"""The linear layers that a projector amounts to, for formats that have nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_core.errors import LlavaError
from llava_core.projector.feature_norm import Center
from llava_core.projector.projector import Projector

TRANSFORMERS = "export it with --to transformers"


def linear_layers(projector: Projector) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of one layer, or of two with GELU between them, in float64.

    The feature norm `center` is in the first bias; `layer` is left to the caller. Raises LlavaError for a
    projector that is something else.
    """
    norm = projector.feature_norm
    inner: Any = projector.map
    if norm is not None:
        inner = inner.projector
    leaves = [module for module in inner.modules() if not list(module.children())]
    linear = [leaf for leaf in leaves if isinstance(leaf, nn.Linear)]
    zeros = [torch.zeros(len(leaf.weight)).double() for leaf in linear]
    layers = [
        (leaf.weight.detach().double(), zero if leaf.bias is None else leaf.bias.detach().double())
        for leaf, zero in zip(linear, zeros, strict=True)
    ]
    if len(linear) == len(leaves):
        while len(layers) > 1:  # a product of matrices
            (weight, bias), (outer, more) = layers[:2]
            layers[:2] = [(outer @ weight, outer @ bias + more)]
    elif [type(leaf) for leaf in leaves] != [nn.Linear, nn.GELU, nn.Linear]:
        raise LlavaError(
            f"a {projector.config['kind']} projector is not made of one or two linear layers",
            expected="linear, lowrank or mlp with two layers",
            do=TRANSFORMERS,
        )
    if isinstance(norm, Center):
        weight, bias = layers[0]
        layers[0] = (weight, bias - weight @ norm.mean.double())
    return layers
