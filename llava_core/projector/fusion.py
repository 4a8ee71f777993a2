"""What a projector does with fused features (`llava_core.fusion`) before its own layers."""

from __future__ import annotations

import torch
from torch import nn

from llava_core.fusion import FusedIdentity, Fusion
from llava_core.identity import EncoderIdentity
from llava_core.projector.visual_tokens import VisualTokens
from llava_core.types import JsonDict


class LayerMix(nn.Module):
    """Features of N layers side by side [..., T, N x D] -> their mean by learnt softmax weights [..., T, D].

    The weights are equal at first. Source: ELMo (arXiv:1802.05365), without its factor, which is the
    projector's.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers))

    @property
    def weights(self) -> list[float]:
        """Weight of each layer; they sum to 1."""
        weights: list[float] = self.logits.detach().softmax(0).tolist()
        return weights

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        layers = torch.stack(features.chunk(len(self.logits), -1), -1)
        mixed: torch.Tensor = layers @ self.logits.softmax(0)
        return mixed


def layer_weights(mix: LayerMix | None, encoder: EncoderIdentity) -> JsonDict:
    """The weight of each layer, as `layer_weight/NAME`; empty without a mix."""
    names = encoder.names if isinstance(encoder, FusedIdentity) else []
    weights = mix.weights if mix is not None else []
    return {f"layer_weight/{name}": weight for name, weight in zip(names, weights, strict=False)}


class EachEncoder:
    """Visual tokens of each encoder's own [..., T_k, D_k], one after another, in channels of its own.

    So the projector's first layer has weights for each encoder, and zeros meet those of the others.
    """

    def __init__(self, select: VisualTokens, fusion: Fusion) -> None:
        self._select, self._fusion, self.widening = select, fusion, select.widening

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        parts = [self._select(features[place]) for place in self._fusion.places]
        widths = [part.shape[-1] for part in parts]
        channels, done = [], 0
        for part, width in zip(parts, widths, strict=True):
            channels.append(nn.functional.pad(part, (done, sum(widths) - done - width)))
            done += width
        return torch.cat(channels, -2)

    def tokens_out(self, tokens: int) -> int:
        assert tokens == self._fusion.tokens
        return sum(self._select.tokens_out(own) for own, _ in self._fusion.shapes)


def mapped_width(fusion: Fusion) -> int:
    """Channels of what the projector's own layers are given, before its visual tokens widen them."""
    widths = [width for _, width in fusion.shapes]
    return widths[0] if fusion.kind == "layers" else sum(widths)
