from __future__ import annotations

import pytest
import torch

from llava_core.errors import LlavaError
from llava_core.projector import build_projector, match_scale, parameter_count


def test_parameters_of_the_reference_sizes() -> None:
    assert parameter_count(build_projector("linear", 768, 1024)) == 787_456
    assert parameter_count(build_projector("mlp", 768, 1024)) == 787_456 + 1024 * 1024 + 1024


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_projected_tokens_start_at_the_scale_of_the_embeddings(kind: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(4, 9, 16) * 7 + 3
    projector = build_projector(kind, 16, 24)
    match_scale(projector, features, target_rms=0.02)
    assert projector(features).pow(2).mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)


def test_unknown_kind() -> None:
    with pytest.raises(LlavaError, match="linear or mlp"):
        build_projector("qformer", 4, 4)
