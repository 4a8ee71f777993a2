"""A vision encoder's weights by the names of llama.cpp's `clip` files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from llava_align.hub.export import vision_settings, vision_weights
from llava_align.hub.linear_layers import TRANSFORMERS
from llava_core.errors import LlavaError
from llava_core.vision.chinese_clip import ChineseClip
from llava_core.vision.tower import VisionTower

OUTSIDE = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.patch_embeddings.projection": "v.patch_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
    "layernorm": "v.post_ln",
}
"""Modules beside the blocks: name in transformers -> name in a GGUF file."""
IN_BLOCK = {
    "layer_norm1": "ln1",
    "norm1": "ln1",
    "layer_norm2": "ln2",
    "norm2": "ln2",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.out_proj": "attn_out",
    **{f"attention.{part}_proj": f"attn_{part}" for part in "qkv"},
    "attention.o_proj": "attn_out",
    "attention.attention.query": "attn_q",  # DINOv2 before transformers 5
    "attention.attention.key": "attn_k",
    "attention.attention.value": "attn_v",
    "attention.output.dense": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""The same of modules in one block."""
BLOCK_TENSORS = 16
"""Tensors of one block: weight and bias of each of its eight modules."""
SCALED = {"layer_scale1.lambda1": "attn_out", "layer_scale2.lambda1": "ffn_down"}
"""DINOv2's factors of what a block adds (layer scale) -> the module into which they are multiplied."""
ACTIVATIONS = {
    "quick_gelu": {},
    "gelu": {"clip.use_gelu": True},
    "gelu_new": {"clip.use_gelu": True},
    "gelu_pytorch_tanh": {"clip.use_gelu": True},
    "silu": {"clip.use_silu": True},
}
"""Activation in transformers -> metadata. llama.cpp has GELU's tanh approximation alone."""


@dataclasses.dataclass(frozen=True)
class EncoderWeights:
    tensors: dict[str, torch.Tensor]
    """Patch embedding, norms and blocks, by their names in a GGUF file; no final norm at an earlier layer."""
    positions: torch.Tensor
    """Position embeddings of the patches, [N, width]."""
    cls: torch.Tensor | None
    """Input of the class token, its position embedding added, [width]; None if there is no such token."""
    blocks: int
    """How many of the blocks are computed."""
    values: dict[str, bool | int | float]
    """Metadata of the encoder."""

    def norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the final norm."""
        return self.tensors["v.post_ln.weight"], self.tensors["v.post_ln.bias"]


def encoder_weights(tower: VisionTower) -> EncoderWeights:
    """Raises LlavaError for an encoder that llama.cpp's plain ViT cannot compute."""
    network: Any = tower.network
    own = isinstance(network, ChineseClip)
    settings = vision_settings(network, Path()) if own else network.config.to_dict()
    activation = settings["hidden_act"]
    weights = {name: tensor.float() for name, tensor in vision_weights(network).items()}
    layer = tower.encoder["layer"]
    blocks = settings["num_hidden_layers"] if layer is None else layer
    tensors, scales = {}, {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"encoder\.layers?\.(\d+)\.(.+)", module)
        if module in OUTSIDE:
            tensors[f"{OUTSIDE[module]}.{kind}"] = tensor
        elif block and int(block[1]) < blocks and block[2] in IN_BLOCK:
            tensors[f"v.blk.{block[1]}.{IN_BLOCK[block[2]]}.{kind}"] = tensor
        elif block and f"{block[2]}.{kind}" in SCALED:
            scales[f"v.blk.{block[1]}.{SCALED[f'{block[2]}.{kind}']}"] = tensor
    for name, factor in scales.items():
        if f"{name}.weight" in tensors:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * factor[:, None]
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"] * factor
    if layer is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("v.post_ln")}
    up = tensors.get("v.blk.0.ffn_up.weight", torch.empty(4 * tower.width, 0))
    whole = len([name for name in tensors if name.startswith("v.blk.")]) == BLOCK_TENSORS * blocks
    if activation not in ACTIVATIONS or not whole:
        raise LlavaError(
            f"llama.cpp's ViT cannot compute the encoder {tower.name}",
            expected=f"CLIP, Chinese-CLIP, SigLIP or DINOv2 with {', '.join(ACTIVATIONS)}",
            got=f"{settings['model_type']} with {activation if whole else 'blocks of other layers'}",
            do=TRANSFORMERS,
        )
    cls, positions = _inputs(tower, weights)
    return EncoderWeights(
        tensors,
        positions,
        cls,
        blocks,
        {
            **ACTIVATIONS[activation],
            "clip.vision.image_size": tower.preprocess.size,
            "clip.vision.patch_size": tensors["v.patch_embd.weight"].shape[-1],
            "clip.vision.embedding_length": tower.width,
            "clip.vision.feed_forward_length": len(up),
            "clip.vision.block_count": blocks,
            "clip.vision.attention.head_count": settings["num_attention_heads"],
            "clip.vision.attention.layer_norm_epsilon": float(settings["layer_norm_eps"]),
        },
    )


def _inputs(tower: VisionTower, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Class token with its position [width], or None; positions of the patches [N, width]."""
    if "embeddings.cls_token" in weights:  # DINOv2, whose positions are interpolated
        embeddings: Any = tower.network.embeddings
        size, tokens = tower.preprocess.size, torch.empty(1, tower.tokens, tower.width)
        table = embeddings.interpolate_pos_encoding(tokens, size, size)[0].float()
        return weights["embeddings.cls_token"][0, 0] + table[0], table[1:]
    table = weights["embeddings.position_embedding.weight"]
    if "embeddings.class_embedding" not in weights:
        return None, table
    return weights["embeddings.class_embedding"] + table[0], table[1:]
