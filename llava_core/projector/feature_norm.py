"""Normalisation of visual features in front of a projector, whichever its kind.

layer   LayerNorm with learned weights, as InternVL has it (arXiv:2404.16821)
center  less their mean over the training features, which is measured once and kept in the checkpoint
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Center(nn.Module):
    """[..., T, width] less the mean token [width], which does not train."""

    mean: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features - self.mean

    @torch.no_grad()
    def measure(self, batches: Iterable[torch.Tensor]) -> None:
        """Take the mean of all tokens of these batches [N, T, width]."""
        sums, n = torch.zeros(len(self.mean), dtype=torch.float64), 0
        for features in batches:
            tokens = features.flatten(0, -2)
            sums += tokens.double().sum(0)
            n += len(tokens)
        self.mean.copy_(sums / n)


FEATURE_NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "center": Center}
"""By the values of --feature-norm but none."""
