"""`mmproj.gguf`: encoder and projector in one of the graphs that llama.cpp has (`clip.projector_type`).

mlp             LLaVA's: linear, GELU, linear. A linear projector is [W; -W], then [I, -I], because
                gelu(x) - gelu(-x) = x; a power of two before and after keeps x out of the range in which
                llama.cpp looks GELU up in half precision.
nemotron_v2_vl  The only one that merges patches and does not send the class token: RMS norm, linear, relu²,
                linear, none with a bias. The final norm gives n with sum 0 and |n|² = width; n + 1 then has a
                norm that is known, so that RMS norm only scales it, and a mean that is known, which serves as
                bias. relu²(c + x) - relu²(c - x) = 4cx for |x| <= c, and |x| is at most |w| * |n|.

Read from llama.cpp b11549 (xllamacpp 2026.10.11549). LLaVA's graph has the class token last, but leaves out
its first token, not the class token (ggml-org/llama.cpp#25814): `sent_tokens`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from gguf import GGMLQuantizationType

from llava_align.hub.gguf_encoder import EncoderWeights, encoder_weights
from llava_align.hub.gguf_file import Tensor, Value
from llava_align.hub.linear_layers import TRANSFORMERS, linear_layers
from llava_core.errors import LlavaError
from llava_core.projector.projector import Projector
from llava_core.vision.tower import VisionTower

PADDING = {"mlp": (122, 116, 104), "nemotron_v2_vl": (0, 0, 0)}
"""Colour in which llama.cpp pads a picture to a square, by the graph."""
HALF_LARGEST = 2048.0
"""How large a typical visual token becomes between the two layers: far below float16's 65504, for GPUs."""


def mmproj(
    tower: VisionTower, projector: Projector, token_rms: float, half: bool
) -> tuple[dict[str, Value], list[Tensor]]:
    """Metadata and tensors of the file; `half` stores the encoder's matrices in float16.

    `token_rms` is how large visual tokens typically are. Raises LlavaError for what no graph computes.
    """
    encoder, config = encoder_weights(tower), projector.config
    merging = re.fullmatch(r"(pool|shuffle)(\d*)", config["visual_tokens"])
    if merging is None and config["visual_tokens"] not in ("all", "patches"):
        raise LlavaError(
            f"llama.cpp knows no visual tokens {config['visual_tokens']}",
            expected="all, patches, poolN or shuffleN",
            do=TRANSFORMERS,
        )
    layers = linear_layers(projector)
    own_norm = config.get("feature_norm") == "layer"
    if own_norm and (merging or tower.encoder["layer"] is None):
        raise LlavaError(
            "llama.cpp has one norm between encoder and projector",
            expected="--feature-norm layer at an earlier --layer, with all or patches",
            got="another norm before it" if merging is None else f"it after {config['visual_tokens']}",
            do=TRANSFORMERS,
        )
    if own_norm:
        norm: Any = projector.feature_norm
        encoder.tensors.update({"v.post_ln.weight": norm.weight, "v.post_ln.bias": norm.bias})
    if merging:
        if encoder.cls is None or len(layers) > 1 or tower.encoder["layer"] is not None:
            raise LlavaError(
                f"llama.cpp cannot compute the visual tokens {config['visual_tokens']} of this projector",
                expected="a linear or lowrank one, of an encoder with a class token, after its final norm",
                got=f"{config['kind']} of {tower.name} at layer "
                f"{'norm' if tower.encoder['layer'] is None else tower.encoder['layer']}",
                do=f"{TRANSFORMERS}, or train with --visual-tokens patches",
            )
        kind, graph = "nemotron_v2_vl", _merging(encoder, *layers[0], merging[1], int(merging[2] or 2))
    else:
        scale = 2.0 ** round(math.log2(HALF_LARGEST / token_rms))
        kind, graph = "mlp", _llava(encoder, layers, scale)
    values: dict[str, Value] = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": kind,
        "clip.vision.projection_dim": int(config["out_width"]),
        "clip.vision.feature_layer": [encoder.blocks],
        "clip.vision.image_mean": list(map(float, tower.preprocess.mean)),
        "clip.vision.image_std": list(map(float, tower.preprocess.std)),
        **({"clip.vision.projector.scale_factor": int(merging[2] or 2)} if merging else {}),
        **encoder.values,
    }
    small = GGMLQuantizationType.F16 if half else GGMLQuantizationType.F32
    return values, [
        Tensor(name, data, small) if name.startswith("v.blk.") and data.ndim == 2 else Tensor(name, data)
        for name, data in {**encoder.tensors, **graph}.items()
    ]


def sent_tokens(tower: VisionTower, projector: Projector) -> slice | None:
    """None if llama.cpp gives the language model the projector's tokens; else which of the encoder's, with
    the class token behind them."""
    merged = projector.config["visual_tokens"] not in ("all", "patches")
    side = math.isqrt(tower.tokens)
    return None if merged or side * side == tower.tokens else slice(2, None)


def _llava(
    encoder: EncoderWeights, layers: list[tuple[torch.Tensor, torch.Tensor]], scale: float
) -> dict[str, torch.Tensor]:
    weight, bias = layers[0]
    if len(layers) == 1:
        eye = torch.eye(len(bias))
        layers = [
            (torch.cat([weight, -weight]) * scale, torch.cat([bias, -bias]) * scale),
            (torch.cat([eye, -eye], 1) / scale, torch.zeros(len(bias))),
        ]
    graph = {"v.position_embd.weight": encoder.positions}
    if encoder.cls is not None:  # last, with its position in it
        nowhere = torch.zeros(1, len(encoder.cls))
        graph = {
            "v.position_embd.weight": torch.cat([encoder.positions, nowhere]),
            "v.class_embd": encoder.cls,
        }
    for number, (weight, bias) in zip((0, 2), layers, strict=True):
        graph |= {f"mm.{number}.weight": weight, f"mm.{number}.bias": bias}
    return graph


def _merging(
    encoder: EncoderWeights, weight: torch.Tensor, bias: torch.Tensor, kind: str, side: int
) -> dict[str, torch.Tensor]:
    """See above; `weight` is [out, width], or with `shuffle` [out, side² * width]."""
    assert encoder.cls is not None
    patches, width = side * side, len(encoder.cls)
    gain, shift = (part.double().repeat(patches) for part in encoder.norm())
    weight = weight.repeat(1, patches) / patches if kind == "pool" else weight
    bias = bias + weight @ shift
    weight = weight * gain
    most = sum(part.norm(dim=1) for part in weight.chunk(patches, 1)) * width**0.5 + bias.abs()
    most, still = most[:, None], (bias - weight.sum(1))[:, None]  # n + 1 adds the sum of each row
    both = torch.cat([weight + (most + still) / weight.shape[1], -weight + (most - still) / weight.shape[1]])
    back = torch.diag(1 / (4 * most[:, 0]))
    ones = torch.ones(width)
    return {
        "v.post_ln.weight": ones,
        "v.post_ln.bias": ones,
        "v.class_embd": encoder.cls[None],
        "v.position_embd.weight": encoder.positions,
        "mm.model.mlp.0.weight": torch.ones(weight.shape[1]),
        "mm.model.mlp.1.weight": both * math.sqrt(2),
        "mm.model.mlp.3.weight": torch.cat([back, -back], 1),
    }
