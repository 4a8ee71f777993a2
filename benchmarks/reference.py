"""The reference shapes through the public commands, with random weights: their values change no speed.

    python -m benchmarks.reference --images 128 --steps 3 --batch-size 4

Chinese-CLIP ViT-B/16 encodes small pictures from a local server, then a projector 768→1024 trains on their
features through a model of Qwen3-0.6B's shape (its vocabulary of 151,936 included).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

from llava_align.demo.world.dataset import write_split
from llava_align.demo.world.server import serve
from llava_align.synthetic_reference import write_language_model, write_vision
from llava_core.filesystem import read_json_lines


@dataclasses.dataclass(frozen=True)
class Settings:
    images: int = 128
    """Pictures to encode."""
    steps: int = 3
    """Optimizer steps."""
    batch_size: int = 16
    """Samples per step."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_vision(root / "vision")
        write_language_model(root / "llm")
        with serve(root / "pictures") as url:
            split = write_split(root, "train", url, settings.images, files=1, seed=0)
            extracted = command(
                *("extract", "run", "--data", split.parquet, "--vision", root / "vision"),
                *("--out", root / "features", "--allow-private"),
            )
        command(
            *("train", "run", "--features", root / "features", "--llm", root / "llm", "--out", root / "run"),
            *("--max-steps", settings.steps, "--batch-size", settings.batch_size, "--epochs", 1000),
            *("--log-every", 1),
        )
        lines = read_json_lines(root / "run/metrics.jsonl")
    steps = [line for line in lines if "samples_per_s" in line][1:]  # the first one warms up
    rates = {key: statistics.median(line[key] for line in steps) for key in ("samples_per_s", "tokens_per_s")}
    print(f"threads: {torch.get_num_threads()}, CUDA: {torch.cuda.is_available()}")
    print(f"extract: {extracted['rows'] / extracted['seconds']:.2f} images/s")
    print(f"train: {rates['samples_per_s']:.2f} samples/s, {rates['tokens_per_s']:.0f} tokens/s")


def command(*arguments: object) -> dict[str, Any]:
    """Run `python -m ...`; returns its summary."""
    words = [sys.executable, "-m", *map(str, arguments), "--json"]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    summary: dict[str, Any] = json.loads(out.splitlines()[-1])
    return summary


if __name__ == "__main__":
    main()
