"""What this machine does in a few seconds: matrix products, reading from disk, encoding, training."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import torch

from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.dataset import draw
from llava_align.subprocess_command import run_command
from llava_align.synthetic_reference import TOKENS, WIDTH, write_features, write_language_model
from llava_core.device import default_dtype, matmul_rate, pick_device
from llava_core.filesystem import flush, read_json_lines
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower

ROW_BYTES = 2 * TOKENS * WIDTH
"""Features of an image of the reference encoder."""
ROWS = 800
PICTURES, STEPS, BATCH = 64, 5, 16


def measure(folder: Path) -> JsonDict:
    """Rates by name, in operations, bytes, images and samples per second; the attention that training takes
    here; what `train plan` expects of the reference. Writes 250 MB for a while.

    Raises LlavaError if one of the commands fails.
    """
    device = pick_device("auto")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".llava-doctor-") as name:
        here = Path(name)
        return {
            "device": str(device),
            "matmul_per_s": matmul_rate(device, default_dtype(device), seconds=1.0),
            "disk_bytes_per_s": _disk_rate(here / "rows"),
            "encoded_per_s": _encoding_rate(device),
            **_training(here),
            **_planned(here),
        }


def _disk_rate(path: Path) -> float:
    """Bytes per second of rows of features in random order, as training reads them."""
    row = os.urandom(ROW_BYTES)
    with path.open("wb") as file:
        for _ in range(ROWS):
            file.write(row)
        file.flush()
        flush(file.fileno(), path)
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # out of the page cache, or it is memory that is measured
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        order = random.Random(0).sample(range(ROWS), ROWS)
        began = time.perf_counter()
        for index in order:
            os.pread(file.fileno(), ROW_BYTES, index * ROW_BYTES)
        seconds = time.perf_counter() - began
    path.unlink()
    return ROWS * ROW_BYTES / seconds


def _encoding_rate(device: torch.device) -> float:
    """Images per second of the built-in world's encoder, in batches of 64, decoding apart."""
    tower = open_vision_tower(MODELS / "vision", device=device)
    size = tower.preprocess.size
    pixels = torch.zeros(PICTURES, size, size, 3, dtype=torch.uint8)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        tower.encode(pixels).cpu()
        best = min(best, time.perf_counter() - began)
    return PICTURES / best


def _training(folder: Path) -> JsonDict:
    """Samples per second of a short run on the built-in world, by the public commands; its attention."""
    rng = random.Random(0)
    pictures, scenes = draw(folder / "pictures", PICTURES, rng)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture.with_suffix(".txt").write_text(caption(scene, rng), encoding="utf-8")
    data, features = ("--data", folder / "pictures"), folder / "features"
    run_command("extract", "run", *data, "--out", features, "--vision", MODELS / "vision", echo=False)
    trained = run_command(
        *("train", "run", "--features", features, "--llm", MODELS / "llm", "--out", folder / "run"),
        *("--batch-size", BATCH, "--max-steps", STEPS, "--epochs", STEPS, "--compile", "off"),
        echo=False,
    )
    (prepared,) = (line for line in read_json_lines(folder / "run/metrics.jsonl") if "attention" in line)
    return {
        "trained_per_s": float(trained["steps_per_s"]) * BATCH,
        **{name: prepared[name] for name in ("attention", "attention_passed_over")},
    }


def _planned(folder: Path) -> JsonDict:
    """Samples per second and bytes that `train plan` expects of Qwen3-0.6B in batches of 16."""
    write_language_model(folder / "reference", weights=False)
    write_features(folder / "reference-features/a.h5", rows=2 * BATCH)
    planned = run_command(
        *("train", "plan", "--features", folder / "reference-features", "--llm", folder / "reference"),
        *("--out", folder / "planned", "--batch-size", BATCH),
        echo=False,
    )
    steps_per_s = planned["matmul_rate"] * planned["efficiency"] / planned["operations_per_step"]
    return {
        "planned_reference_samples_per_s": steps_per_s * BATCH,
        "planned_reference_memory_bytes": sum(planned["memory"].values()),
    }
