"""Chinese-CLIP's two towers in plain torch, with the parameter names of the published weights.

Source: A. Yang et al., Chinese CLIP, arXiv:2211.01335; names as in github.com/OFA-Sys/Chinese-CLIP, so that a
state dict loads strictly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from torch import nn

PAD = 0
"""Token id of [PAD] in Chinese-CLIP's vocab.txt."""
CONTEXT = 52
"""Tokens of a text, with [CLS] and [SEP]; longer texts are truncated."""


class TextTokenizer:
    """BERT's word pieces from a vocab.txt, lower-cased, one token a Chinese character."""

    context = CONTEXT

    def __init__(self, vocab: Path) -> None:
        self.pieces = BertWordPieceTokenizer(str(vocab), lowercase=True)
        self.pieces._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is no special token
        self.pieces.enable_truncation(CONTEXT)
        self.pieces.enable_padding(length=CONTEXT, pad_id=PAD)

    def length(self, text: str) -> int:
        """Number of tokens, with [CLS] and [SEP], before truncation."""
        encoding = self.pieces.encode(text)
        return 2 + sum(int(sum(part.attention_mask)) - 2 for part in (encoding, *encoding.overflowing))

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts -> token ids [texts, CONTEXT], padded with PAD."""
        return torch.tensor([encoding.ids for encoding in self.pieces.encode_batch(list(texts))])


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32, whatever the dtype of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        ).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention under nn.MultiheadAttention's parameter names: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        projected: torch.Tensor = self.out_proj(attended.reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_fc(x)
        x = x * torch.sigmoid(1.702 * x)  # QuickGELU
        projected: torch.Tensor = self.c_proj(x)
        return projected


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = Mlp(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Pixels [B, 3, S, S] -> tokens [B, 1 + (S / patch)**2, width]; token 0 is CLS."""

    def __init__(
        self, resolution: int, patch: int, width: int, layers: int, heads: int, embed_dim: int
    ) -> None:
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, pixels: torch.Tensor, layers: Sequence[int | None]) -> list[torch.Tensor]:
        """Of each layer the hidden states after that many blocks; of None all tokens after `ln_post`.

        Layers count as in transformers' `hidden_states`: 0 is the input of the first block, -1 the output of
        the last, -2 (LLaVA's choice) that of the one before.
        """
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([cls, patches], dim=1) + self.positional_embedding.to(patches.dtype)
        x = self.ln_pre(x)
        blocks = len(self.transformer.resblocks)
        depths = [blocks if layer is None else layer % (blocks + 1) for layer in layers]
        hidden = {0: x}
        for depth, block in enumerate(self.transformer.resblocks[: max(depths)], 1):
            x = block(x)
            if depth in depths:
                hidden[depth] = x
        return [
            self.ln_post(hidden[depth]) if layer is None else hidden[depth]
            for depth, layer in zip(depths, layers, strict=True)
        ]


class ChineseClip(nn.Module):
    """Vision and, with `text`, text tower, from the JSON configurations of a ModelScope folder."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any] | None) -> None:
        super().__init__()
        width, embed_dim = vision["vision_width"], vision["embed_dim"]
        self.visual = VisionTransformer(
            resolution=vision["image_resolution"],
            patch=vision["vision_patch_size"],
            width=width,
            layers=vision["vision_layers"],
            heads=width // vision.get("vision_head_width", 64),
            embed_dim=embed_dim,
        )
        if text is not None:
            self._add_text_tower(text, embed_dim)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, S, S] -> image embeddings [B, embed_dim], not L2-normalised."""
        return self.embed_tokens(self.visual(pixels, [None])[0])

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens after `ln_post` [B, T, width] -> image embeddings [B, embed_dim]."""
        return tokens[:, 0] @ self.visual.proj.to(tokens.dtype)

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, L], padded with PAD -> text embeddings [B, embed_dim], not L2-normalised."""
        hidden = self.bert(ids, attention_mask=ids.ne(PAD).long()).last_hidden_state
        embedded: torch.Tensor = hidden[:, 0] @ self.text_projection.to(hidden.dtype)
        return embedded

    def _add_text_tower(self, text: dict[str, Any], embed_dim: int) -> None:
        from transformers import BertConfig, BertModel  # takes seconds, needed for texts alone

        config = BertConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["text_hidden_size"],
            num_hidden_layers=text["text_num_hidden_layers"],
            num_attention_heads=text["text_num_attention_heads"],
            intermediate_size=text["text_intermediate_size"],
            hidden_act=text["text_hidden_act"],
            hidden_dropout_prob=text["text_hidden_dropout_prob"],
            attention_probs_dropout_prob=text["text_attention_probs_dropout_prob"],
            max_position_embeddings=text["text_max_position_embeddings"],
            type_vocab_size=text["text_type_vocab_size"],
            initializer_range=text["text_initializer_range"],
            layer_norm_eps=1e-12,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.text_projection = nn.Parameter(
            torch.randn(text["text_hidden_size"], embed_dim) * text["text_hidden_size"] ** -0.5
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
