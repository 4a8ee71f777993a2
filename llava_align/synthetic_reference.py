"""Random models and features in the reference's shapes (Chinese-CLIP ViT-B/16, Qwen3-0.6B), to measure."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_core.row_status import Status
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.types import JsonDict

VIT_B_16 = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 16,
}
QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
}
TOKENS, WIDTH = 197, 768
ENCODER: JsonDict = {"model_id": "random", "weights_sha256": "0" * 64, "tokens": TOKENS, "width": WIDTH}
SENTENCES = (2, 6)
"""Fewest and most captions of the demo's world that are joined into one: 40 to 130 tokens."""
DRAWN = 64
"""Rows of features that are drawn at random; the others repeat them."""


def write_vision(folder: Path) -> None:
    """Write Chinese-CLIP with a ViT-B/16 in ModelScope's layout."""
    import torch

    from llava_core.vision.chinese_clip import ChineseClip

    folder.mkdir()
    shutil.copy(MODELS / "vision/vocab.txt", folder)
    text = json.loads((MODELS / "vision/text_model_config.json").read_text())
    (folder / "text_model_config.json").write_text(json.dumps(text))
    (folder / "vision_model_config.json").write_text(json.dumps(VIT_B_16))
    torch.save(ChineseClip(VIT_B_16, text).state_dict(), folder / "pytorch_model.bin")


def write_language_model(folder: Path, weights: bool = True) -> None:
    """Write Qwen3-0.6B with the demo's tokenizer; without `weights` it serves `train plan` alone."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "llm")
    config = Qwen3Config(**QWEN3_0_6B, eos_token_id=tokenizer.eos_token_id)
    if weights:
        Qwen3ForCausalLM(config).save_pretrained(folder)
    else:
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_features(
    path: Path, rows: int, encoder: JsonDict = ENCODER, preprocess: JsonDict | None = None, seed: int = 0
) -> None:
    """A finished shard of `rows` rows of noise, fp16 [tokens, width], with captions of unlike lengths."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    lengths = [rng.randint(*SENTENCES) for _ in range(rows)]
    words = ["".join(caption(random_scene(rng), rng) for _ in range(length)) for length in lengths]
    names = [str(row) for row in range(rows)]
    shape = (min(rows, DRAWN), encoder["tokens"], encoder["width"])
    drawn = noise.standard_normal(shape, dtype=np.float32).astype("<f2")
    header: dict[str, Any] = {"captions": words, "urls": names, "ids": names}
    made = ShardHeader(encoder, preprocess or {}, {}, encoder["tokens"], encoder["width"], **header)
    with ShardWriter(path, made) as writer:
        for start in range(0, rows, DRAWN):
            part = range(start, min(start + DRAWN, rows))
            writer.write([RowRecord(row, Status.OK, drawn[row % DRAWN]) for row in part])
        writer.finish()
