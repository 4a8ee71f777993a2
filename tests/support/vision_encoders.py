"""Vision folders with random weights, and the published Chinese-CLIP code to compare with."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_core.vision.chinese_clip import ChineseClip

VISION: dict[str, Any] = {
    "embed_dim": 16,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 16,
}
TEXT: dict[str, Any] = {
    "vocab_size": 12,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 32,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 48,
    "text_max_position_embeddings": 64,
    "text_num_attention_heads": 2,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}
VOCAB = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "蓝", "色", "的", "圆", "a", "##b")


def write_vision_folder(
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    vision: dict[str, Any] = VISION,
    seed: int = 0,
    text: dict[str, Any] = TEXT,
    vocab: Sequence[str] = VOCAB,
) -> Path:
    """A Chinese-CLIP folder as ModelScope publishes it: fp16, under `state_dict`, prefixed names."""
    folder.mkdir(parents=True, exist_ok=True)
    if weights is None:
        torch.manual_seed(seed)
        weights = ChineseClip(vision, text).state_dict()
    published = {f"module.clip_model.{name}": value.half() for name, value in weights.items()}
    torch.save({"epoch": 1, "state_dict": published}, folder / "pytorch_model.bin")
    (folder / "vision_model_config.json").write_text(json.dumps(vision))
    (folder / "text_model_config.json").write_text(json.dumps(text))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return folder


def write_hugging_face(folder: Path, model: Any, **preprocess: Any) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    return folder


def published_clip(vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT) -> Any:
    """cn-clip's own model with every weight random, rounded to fp16's values, in eval mode."""
    torch.manual_seed(0)
    model = _cn_clip_model().CLIP(**vision, **text).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.02 * torch.randn_like(parameter)
            parameter.copy_((parameter + noise).half().float())
    return model


def published_vocabulary() -> list[str]:
    """The word pieces of Chinese-CLIP's vocab.txt, as cn-clip brings them."""
    return (_cn_clip() / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")


def published_tokens(texts: Sequence[str], length: int) -> torch.Tensor:
    """What cn-clip's `tokenize` gives, which itself lies in a module that asks for torchvision."""
    _cn_clip_model()
    sys.modules.setdefault("six", types.SimpleNamespace(PY2=False, PY3=True))  # type: ignore[arg-type]
    split = importlib.import_module("cn_clip.clip.bert_tokenizer").FullTokenizer()
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        words = ["[CLS]", *split.tokenize(text)[: length - 2], "[SEP]"]
        row[: len(words)] = torch.tensor(split.convert_tokens_to_ids(words))
    return ids


def _cn_clip() -> Path:
    spec = importlib.util.find_spec("cn_clip")
    assert spec is not None, "pip install --no-deps cn-clip"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "clip"


def _cn_clip_model() -> Any:
    """The module cn_clip.clip.model without its package's __init__, which asks for torchvision."""
    folder = _cn_clip()
    if "cn_clip.clip" not in sys.modules:
        package: Any = types.ModuleType("cn_clip.clip")
        package.__path__ = [str(folder)]
        package._tokenizer = types.SimpleNamespace(vocab={"[PAD]": 0})
        sys.modules["cn_clip.clip"] = package
    return importlib.import_module("cn_clip.clip.model")
