"""What a projector amounts to is proved, not told from the types of its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_align.hub.linear_layers import linear_layers
from llava_core.errors import LlavaError
from llava_core.projector.projector import build_projector


class Residual(nn.Sequential):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return features + added


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(features) * self.scale
        return found


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.back = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.back(self.left(features) + self.right(features))
        return found


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.first(features))
        return found


@pytest.mark.parametrize(
    "inner",
    [
        Residual(nn.Linear(8, 8)),
        Residual(nn.Linear(8, 4), nn.Linear(4, 8)),
        Residual(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.GELU("tanh"), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        Scaled(),
        Sum(),
        Reversed(),
        nn.Identity(),
    ],
)
@pytest.mark.parametrize("feature_norm", ["none", "center"])
def test_a_class_that_does_more_is_refused(inner: nn.Module, feature_norm: str) -> None:
    torch.manual_seed(0)
    for layer in inner.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    projector = build_projector("linear", 8, 8, "all", feature_norm=feature_norm)
    if feature_norm == "none":
        projector.map = inner
    else:
        projector.map.projector = inner
    with pytest.raises(LlavaError, match="is not made of one or two linear layers"):
        linear_layers(projector)


def test_a_class_that_is_one_is_taken() -> None:
    projector = build_projector("linear", 8, 8, "all")
    projector.map = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert len(linear_layers(projector)) == 2
