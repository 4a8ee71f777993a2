"""The projector (connector), the part that trains: vision features to token embeddings of the language model.

It may mix the layers of --fuse layers (`fusion.py`), selects visual tokens (`visual_tokens.py`), without
weights, may normalise them (`feature_norm.py`), then maps them to the language model's width (`kinds/`).
Selections and kinds have names, which `llava_core/registry.py` lists.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from llava_core.errors import LlavaError, as_llava_error
from llava_core.fusion import Fusion
from llava_core.projector.feature_norm import FEATURE_NORMS
from llava_core.projector.fusion import EachEncoder, LayerMix, mapped_width
from llava_core.projector.visual_tokens import INSTEAD_OF_GRID, VisualTokens
from llava_core.registry import PROJECTORS, VISUAL_TOKENS, Entry
from llava_core.types import JsonDict

LAYER_LOGITS = "layer_mix.logits"
"""Name in a checkpoint of the weights of --fuse layers, before their softmax."""


class Projector(nn.Module):
    """Features [..., T, in_width] -> visual tokens [..., tokens_out(T), out_width]."""

    def __init__(
        self,
        kind: str,
        in_width: int,
        out_width: int,
        visual_tokens: str,
        visual_tokens_arguments: JsonDict,
        feature_norm: str = "none",
        fusion: JsonDict | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        fused = Fusion.from_json(fusion) if fusion else None
        chosen = PROJECTORS.get(kind).with_arguments(arguments)
        tokens = VISUAL_TOKENS.get(visual_tokens).with_arguments(visual_tokens_arguments)
        self.config = {
            "kind": chosen.reference,
            "in_width": in_width,
            "out_width": out_width,
            "visual_tokens": tokens.reference,
            **({"visual_tokens_arguments": tokens.recorded} if tokens.recorded else {}),
            **({"feature_norm": feature_norm} if feature_norm != "none" else {}),
            **({"fusion": fusion} if fusion else {}),
            **chosen.recorded,
        }
        """Arguments of `build_projector`, as a checkpoint records them."""
        self.mix = LayerMix(len(fused.shapes)) if fused and fused.kind == "layers" else None
        """Weighs the layers of --fuse layers."""
        self.select: VisualTokens = _selecting(tokens, fused)
        widened = (mapped_width(fused) if fused else in_width) * self.select.widening
        self.map: nn.Module = chosen.build(widened, out_width)
        if feature_norm != "none":
            norm = FEATURE_NORMS[feature_norm](widened)
            self.map = nn.Sequential(OrderedDict(feature_norm=norm, projector=self.map))
        """Holds all other weights; a checkpoint has them by their names in its state dict."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.map(self.selected(features))
        return projected

    def selected(self, features: torch.Tensor) -> torch.Tensor:
        """The visual tokens before all normalisation: [..., T, in_width] -> [..., T', width of `map`]."""
        return self.select(features if self.mix is None else self.mix(features))

    @property
    def feature_norm(self) -> nn.Module | None:
        """What normalises the features, a class of `feature_norm.py`; None if nothing does."""
        norm: nn.Module | None = self.map.feature_norm if "feature_norm" in self.config else None  # type: ignore[assignment]
        return norm

    def checkpoint_weights(self) -> dict[str, torch.Tensor]:
        """All weights by their names in a checkpoint."""
        mix = {} if self.mix is None else {LAYER_LOGITS: self.mix.logits}
        return {**self.map.state_dict(), **mix}

    def load_checkpoint_weights(self, weights: dict[str, torch.Tensor]) -> None:
        rest = dict(weights)
        if self.mix is not None:
            self.mix.load_state_dict({"logits": rest.pop(LAYER_LOGITS)})
        self.map.load_state_dict(rest)

    def tokens_out(self, tokens: int) -> int:
        """Number of visual tokens for `tokens` of an encoder. Raises LlavaError if they cannot be cut so."""
        names = f"the visual tokens {self.config['visual_tokens']} or the projector {self.config['kind']}"
        with as_llava_error(f"tokens_out of {names} fails for {tokens} tokens"):
            selected = self.select.tokens_out(tokens)
            kind: Any = self.map if self.feature_norm is None else self.map.projector
            tokens_out = getattr(kind, "tokens_out", None)  # a resampler may change the number
            return int(tokens_out(selected)) if tokens_out else selected

    @torch.no_grad()
    def require_shapes(self, tokens: int) -> None:
        """Raise LlavaError unless features [2, tokens, in_width] become [2, tokens_out, out_width].

        Also for a projector without weights to train, or with two names for one weight.
        """
        if not any(weight.requires_grad for weight in self.parameters()):
            raise LlavaError(f"the projector {self.config['kind']} has no weight to train")
        places: dict[int, str] = {}
        for name, tensor in self.map.state_dict().items():
            if (
                not tensor.is_meta
                and tensor.numel()
                and (first := places.setdefault(tensor.data_ptr(), name)) != name
            ):
                raise LlavaError(
                    f"the projector {self.config['kind']} has {first} and {name} in one place",
                    do="a checkpoint keeps each weight once: register the module under one name",
                )
        expected = (2, self.tokens_out(tokens), self.config["out_width"])
        with as_llava_error(f"the projector {self.config['kind']} fails"):
            got = tuple(self(torch.zeros(2, tokens, self.config["in_width"])).shape)
        if got != expected:
            raise LlavaError(
                f"the projector {self.config['kind']} gives another shape", expected=expected, got=got
            )


def build_projector(
    kind: str,
    in_width: int,
    out_width: int,
    visual_tokens: str = "all",
    visual_tokens_arguments: JsonDict | None = None,
    feature_norm: str = "none",
    fusion: JsonDict | None = None,
    **arguments: Any,
) -> Projector:
    """A projector, initialised as its classes do.

    `kind` and `visual_tokens` are names or `module:Class`; `arguments` go to the projector's constructor,
    `visual_tokens_arguments` to the other one; `feature_norm` is none or a name of FEATURE_NORMS; `fusion` is
    Fusion.to_json of fused features. Raises LlavaError for an unknown name, or if one fails.
    """
    own = visual_tokens_arguments or {}
    return Projector(kind, in_width, out_width, visual_tokens, own, feature_norm, fusion, **arguments)


def require_tokens(kind: str, visual_tokens: str, tokens: int, fusion: Fusion | None = None) -> None:
    """Raise LlavaError unless the visual tokens, and a built-in projector's, can be made of an encoder's.

    With `fusion`, of those of several encoders.
    """
    with as_llava_error(f"tokens_out of the visual tokens {visual_tokens} fails for {tokens} tokens"):
        selected = _selecting(VISUAL_TOKENS.get(visual_tokens), fusion).tokens_out(tokens)
    if PROJECTORS.stem(kind) and hasattr((chosen := PROJECTORS.get(kind)).target, "tokens_out"):
        if fusion and fusion.kind == "tokens" and getattr(chosen.target, "grid", False):
            raise LlavaError(
                f"--projector {kind} takes one grid of patches",
                got=f"{len(fusion.shapes)} one after another (--fuse tokens)",
                do=f"{INSTEAD_OF_GRID}, or --fuse channels",
            )
        with torch.device("meta"):  # which draws no random numbers
            chosen.build(1, 1).tokens_out(selected)  # whatever its widths


def _selecting(tokens: Entry, fusion: Fusion | None) -> VisualTokens:
    """Visual tokens of an encoder's, or of each one's own where they lie one after another."""
    select: VisualTokens = tokens.build()
    return EachEncoder(select, fusion) if fusion and fusion.kind == "tokens" else select


def described(config: JsonDict) -> str:
    """A projector's config, less its widths, in words: "mlp, visual tokens all"."""
    rest = {key: value for key, value in config.items() if key not in ("kind", "in_width", "out_width")}
    if "fusion" in rest:
        rest["fusion"] = rest["fusion"]["kind"]
    return ", ".join([config["kind"], *(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())])


def last_linear(projector: nn.Module) -> nn.Linear:
    """The linear layer constructed last. Raises LlavaError if there is none."""
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise LlavaError("this projector has no nn.Linear to start from", do="use --start torch")
    return layers[-1]


@torch.no_grad()
def match_scale(projector: nn.Module, features: torch.Tensor, target_rms: float) -> None:
    """Scale the last linear layer: projected `features` [..., T, in_width] get an RMS of `target_rms`.

    Tokens far larger or smaller than the model's embeddings lie outside the range that its first block was
    trained on, and cost the first hundred steps. Raises LlavaError if the layer does not set the scale.
    """
    last = last_linear(projector)
    if last.bias is not None:
        last.bias.zero_()
    last.weight.mul_(target_rms / projector(features).pow(2).mean().sqrt())
    reached = float(projector(features).pow(2).mean().sqrt())
    if not math.isclose(reached, target_rms, rel_tol=0.01):
        raise LlavaError(
            "the last nn.Linear does not set the scale of this projector's tokens",
            expected=f"an RMS of {target_rms:.3g}",
            got=f"{reached:.3g}",
            do="use --start torch",
        )


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
