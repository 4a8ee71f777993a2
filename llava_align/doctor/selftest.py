"""Self-test of `llava doctor`: rates of matrix products, reading features, encoding and training."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.dataset import draw
from llava_align.subprocess_command import run_command
from llava_align.synthetic_reference import write_features, write_language_model
from llava_core.device import default_dtype, matmul_rate, pick_device
from llava_core.filesystem import read_json_lines
from llava_core.types import JsonDict

FEATURE_ROWS = 800
"""Rows of features that are read: 240 MB."""
PICTURES, STEPS, BATCH = 64, 5, 16


def measure(folder: Path) -> JsonDict:
    """Rates in FLOP, bytes, images and samples per second; training's attention; the plan for the reference.

    Writes 250 MB for a while. Raises LlavaError if one of the commands fails.
    """
    device = pick_device("auto")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".llava-doctor-") as name:
        here = Path(name)
        return {
            "device": str(device),
            "matmul_per_s": matmul_rate(device, default_dtype(device), seconds=1.0),
            **_world(here),
            **_reference(here),
        }


def _world(folder: Path) -> JsonDict:
    """On the built-in world: images encoded per second, samples trained per second, training's attention."""
    rng = random.Random(0)
    pictures, scenes = draw(folder / "pictures", PICTURES, rng)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture.with_suffix(".txt").write_text(caption(scene, rng), encoding="utf-8")
    given = ("--data", folder / "pictures", "--vision", MODELS / "vision", "--out", folder / "features")
    benched = run_command("extract", "bench", *given, "--count", PICTURES, echo=False)
    run_command("extract", "run", *given, echo=False)
    trained = run_command(
        *("train", "run", "--features", folder / "features", "--llm", MODELS / "llm"),
        *("--out", folder / "run", "--batch-size", BATCH, "--compile", "off"),
        *("--max-steps", STEPS, "--epochs", STEPS),
        echo=False,
    )
    (prepared,) = (line for line in read_json_lines(folder / "run/metrics.jsonl") if "attention" in line)
    return {
        "encoded_per_s": benched["stages"]["encode"]["samples_per_s"],
        "trained_per_s": float(trained["steps_per_s"]) * BATCH,
        **{name: prepared[name] for name in ("attention", "attention_passed_over")},
    }


def _reference(folder: Path) -> JsonDict:
    """With the reference's shapes: bytes of features read per second, and what `train plan` expects."""
    features = folder / "reference-features"
    write_language_model(folder / "reference", weights=False)
    write_features(features / "a.h5", rows=FEATURE_ROWS)
    read = run_command("extract", "bench", "--features", features, "--count", FEATURE_ROWS, echo=False)
    planned = run_command(
        *("train", "plan", "--features", features, "--llm", folder / "reference"),
        *("--out", folder / "planned", "--batch-size", BATCH),
        echo=False,
    )
    steps_per_s = planned["matmul_rate"] * planned["efficiency"] / planned["operations_per_step"]
    return {
        # Cold, unless this system cannot drop files from its page cache.
        "disk_bytes_per_s": (read["as_training_cold"] or read["as_training_warm"])["bytes_per_s"],
        "planned_reference_samples_per_s": steps_per_s * BATCH,
        "planned_reference_memory_bytes": sum(planned["memory"].values()),
    }
