"""The one part that trains: vision features to token embeddings of the language model.

A projector is a choice of visual tokens (VISUAL_TOKENS), which has no weights, then a map of each of them to
the language model's width (PROJECTORS).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llava_core.errors import LlavaError
from llava_core.projector.visual_tokens import VISUAL_TOKENS


class Linear(nn.Linear):
    """[..., T, in_width] -> [..., T, out_width]. 768 -> 1024 has 787,456 parameters."""


class Mlp(nn.Sequential):
    """Linear, GELU, linear with the output's width between them (LLaVA-1.5's mlp2x_gelu)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {"linear": Linear, "mlp": Mlp}


class Projector(nn.Module):
    """Features [..., T, in_width] -> visual tokens [..., tokens_out(T), out_width]."""

    def __init__(self, kind: str, in_width: int, out_width: int, visual_tokens: str = "all") -> None:
        super().__init__()
        self.config = {
            "kind": kind,
            "in_width": in_width,
            "out_width": out_width,
            "visual_tokens": visual_tokens,
        }
        self.select = VISUAL_TOKENS[visual_tokens]()
        self.map = PROJECTORS[kind](in_width * self.select.widening, out_width)
        """All weights; a checkpoint holds them by their names in here."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.map(self.select(features))
        return projected

    def tokens_out(self, tokens: int) -> int:
        """Visual tokens the language model sees for an encoder's. Raises LlavaError if they do not fit."""
        return self.select.tokens_out(tokens)


def build_projector(kind: str, in_width: int, out_width: int, visual_tokens: str = "all") -> Projector:
    """A projector of a kind in PROJECTORS on a choice in VISUAL_TOKENS, with torch's default initialisation.

    Raises LlavaError for an unknown kind or choice.
    """
    for name, known in ((kind, PROJECTORS), (visual_tokens, VISUAL_TOKENS)):
        if name not in known:
            what = "projector" if known is PROJECTORS else "visual tokens"
            raise LlavaError(f"unknown {what} {name!r}", expected=" or ".join(known))
    return Projector(kind, in_width, out_width, visual_tokens)


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
