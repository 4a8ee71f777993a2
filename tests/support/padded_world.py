"""Captioned pictures of eight shapes and an encoder without a class token, for exports with `--fit pad`.

`python -m tests.support.padded_world FOLDER` writes the folders train, held-out and check, and two
SigLIP-like encoders of one set of random weights: `clip-mean`, and `half-mean` with SigLIP's mean, 0.5.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from llava_align.demo.world.captions import caption
from llava_align.demo.world.render import render
from llava_align.demo.world.scene import random_scene
from llava_align.hub.gguf_check import SHAPES
from tests.support.vision_encoders import write_hugging_face

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
COUNTS = {"train": 2048, "held-out": 128, "check": 100}


def write_padded_world(folder: Path) -> None:
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=96, patch_size=16))
    square = {"size": {"height": 96, "width": 96}, "resample": 3}
    write_hugging_face(folder / "clip-mean", model, **square)
    write_hugging_face(folder / "half-mean", model, **square, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    rng = random.Random(7)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for number in range(count):
            scene = random_scene(rng)
            render(scene, rng).resize(SHAPES[number % len(SHAPES)]).save(folder / name / f"{number:05}.png")
            (folder / name / f"{number:05}.txt").write_text(caption(scene, rng), encoding="utf-8")


if __name__ == "__main__":
    write_padded_world(Path(sys.argv[1]))
