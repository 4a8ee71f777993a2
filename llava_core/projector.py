"""The one part that trains: vision features to token embeddings of the language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llava_core.errors import LlavaError


class LinearProjector(nn.Linear):
    """[..., T, in_width] -> [..., T, out_width]. 768 -> 1024 has 787,456 parameters."""


class MlpProjector(nn.Sequential):
    """Linear, GELU, linear with the output's width between them (LLaVA-1.5's mlp2x_gelu)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": LinearProjector, "mlp": MlpProjector}


def build_projector(kind: str, in_width: int, out_width: int) -> nn.Module:
    """A projector of one of the kinds in PROJECTORS with torch's default initialisation.

    Raises LlavaError for an unknown kind.
    """
    if kind not in PROJECTORS:
        raise LlavaError(f"unknown projector {kind!r}", expected=" or ".join(PROJECTORS))
    return PROJECTORS[kind](in_width, out_width)


@torch.no_grad()
def match_scale(projector: nn.Module, features: torch.Tensor, target_rms: float) -> None:
    """Scale the last linear layer so that projected `features` [..., T, in_width] have this RMS per number.

    A token far larger or smaller than the model's own embeddings leaves the range its first block was trained
    on, and the first hundred steps go into undoing that.
    """
    last = [module for module in projector.modules() if isinstance(module, nn.Linear)][-1]
    last.bias.zero_()
    last.weight.mul_(target_rms / projector(features).pow(2).mean().sqrt())


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
