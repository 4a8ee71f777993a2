"""The linear layers that a projector amounts to, for formats that have nothing else."""

from __future__ import annotations

import itertools
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
    projector that is something else, such as a class whose `forward` does more with its layers.
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
    fits = all(len(before[1]) == after[0].shape[1] for before, after in itertools.pairwise(layers))
    if fits and len(linear) == len(leaves):
        while len(layers) > 1:  # a product of matrices
            (weight, bias), (outer, more) = layers[:2]
            layers[:2] = [(outer @ weight, outer @ bias + more)]
    if not fits or len(layers) not in (1, 2) or not _computes(inner, layers):
        raise LlavaError(
            f"a {projector.config['kind']} projector is not made of one or two linear layers",
            expected="linear, lowrank or mlp with two layers",
            do=TRANSFORMERS,
        )
    if isinstance(norm, Center):
        weight, bias = layers[0]
        layers[0] = (weight, bias - weight @ norm.mean.double())
    return layers


def _computes(inner: nn.Module, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether a module gives what these layers give, for random tokens [1, 4, width]."""
    width = layers[0][0].shape[1]
    tokens = 3 * torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    expected = tokens.double()
    for number, (weight, bias) in enumerate(layers):
        expected = nn.functional.linear(nn.functional.gelu(expected) if number else expected, weight, bias)
    try:
        with torch.inference_mode():
            got: torch.Tensor = inner(tokens.to(next(inner.parameters()))).cpu().double()
    except RuntimeError:  # the layers come in another order
        return False
    return got.shape == expected.shape and bool((got - expected).norm() <= 1e-5 * expected.norm())
