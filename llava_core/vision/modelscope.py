"""Loader for Chinese-CLIP in a folder as ModelScope publishes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llava_core.errors import LlavaError, first_line
from llava_core.input_folders import MODELSCOPE_FILES
from llava_core.vision.chinese_clip import ChineseClip, TextTokenizer
from llava_core.vision.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from llava_core.vision.tower import VisionTower, encoder_record, layer_index, read_json

TEXT_WEIGHTS = ("bert.", "text_projection", "logit_scale")
"""Name prefixes of the weights that encoding images does not need."""


def open_modelscope(
    folder: Path, device: torch.device, dtype: torch.dtype, layer: int | None, decode: str, text: bool
) -> VisionTower:
    vision, text_config = (read_json(folder / name) for name in MODELSCOPE_FILES[:2])
    weights = folder / "pytorch_model.bin"
    try:
        clip = ChineseClip(vision, text_config if text else None)
        state = _plain_names(torch.load(weights, map_location="cpu", weights_only=True))
        if not text:
            state = {name: value for name, value in state.items() if not name.startswith(TEXT_WEIGHTS)}
        clip.load_state_dict(state)
    except KeyError as error:
        raise LlavaError(f"a configuration in {folder} lacks {error}", do="download it again") from None
    except Exception as error:  # torch raises many kinds of exception for damaged files
        raise LlavaError(
            f"cannot load {weights}",
            expected="Chinese-CLIP's weights",
            got=first_line(error),
            do="download it again",
        ) from None
    clip = clip.float().eval().requires_grad_(False).to(device, dtype)
    blocks = vision["vision_layers"]
    layer = layer_index(layer, blocks, folder.name)
    tokens = (vision["image_resolution"] // vision["vision_patch_size"]) ** 2 + 1
    return VisionTower(
        preprocess=Preprocess(vision["image_resolution"], CLIP_MEAN, CLIP_STD, decode=decode),
        encoder=encoder_record(folder, [weights], layer, tokens, vision["vision_width"], dtype),
        device=device,
        dtype=dtype,
        _tokens=lambda pixels: clip.visual(pixels, [layer])[0],
        network=clip,
        _layers=clip.visual,
        _blocks=blocks,
        _clip=clip,
        _tokenizer=TextTokenizer(folder / "vocab.txt") if text else None,
    )


def _plain_names(loaded: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights from `state_dict`, if there, without name prefixes and without BERT's pooler."""
    state = loaded.get("state_dict", loaded)
    plain = {name.removeprefix("module.").removeprefix("clip_model."): value for name, value in state.items()}
    unused = ("bert.pooler.", "bert.embeddings.position_ids")
    return {name: value for name, value in plain.items() if not name.startswith(unused)}
