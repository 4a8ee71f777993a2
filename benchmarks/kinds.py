"""Kinds of projector side by side on the demo's features: python -m benchmarks.kinds --demo demo-out

DEMO is a folder that `llava demo` has filled. For each kind: `train run` on its features, `infer
batch` on its held-out pictures, and the share of attributes that the answers name rightly. With --passes
instead: seconds of a forward and backward pass in the reference shape, the kinds in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from llava_align.config import MODELS
from llava_align.demo.world.captions import accuracy
from llava_align.demo.world.scene import Scene, random_scene
from llava_core.cli.console import table
from llava_core.filesystem import read_json_lines
from llava_core.language.instructions import QUESTION
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import build_projector, parameter_count
from llava_core.registry import VISUAL_TOKENS
from train.flops import projector_operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--out", type=Path, default=Path("kinds"))
    parser.add_argument("--kinds", nargs="+", default=["linear", "mlp"])
    parser.add_argument("--passes", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    if given.passes:
        print(table(*time_passes(given.kinds, given.passes)))
        return
    pictures = sorted((given.demo / "pictures/held-out").glob("*.jpg"))
    rng = random.Random("held-out/0")  # as the demo draws them
    scenes = [random_scene(rng) for _ in pictures]
    lines = [json.dumps({"image": str(path.resolve()), "prompt": QUESTION}) + "\n" for path in pictures]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [
        measure(given.demo, given.out, kind, visual_tokens, given.steps, scenes)
        for visual_tokens, kind in itertools.product(VISUAL_TOKENS.builtins, given.kinds)
    ]
    header = ("kind", "parameters", "samples/s", "CPU s", "data wait", "loss", "gap",
              "shape", "colour", "place", "all")  # fmt: skip
    print(table(rows, header))


def time_passes(kinds: list[str], passes: int) -> tuple[list[tuple[object, ...]], tuple[str, ...]]:
    """Rows and header: CPU seconds of a pass over 8 pictures of 197 tokens, 768 -> 1024 wide."""
    projectors = {kind: build_projector(kind, 768, 1024) for kind in kinds}
    features, seconds = torch.randn(8, 197, 768), {kind: list[float]() for kind in kinds}
    for _ in range(passes + 1):  # the first one warms up
        for kind, projector in projectors.items():
            begun = time.process_time()
            projector(features).sum().backward()
            seconds[kind].append(time.process_time() - begun)
    rows: list[tuple[object, ...]] = []
    for kind, projector in projectors.items():
        took = sorted(seconds[kind][1:])
        giga = projector_operations(projector, 197) / 1e9
        rows.append((kind, f"{parameter_count(projector):,}", projector.tokens_out(197),
                     f"{giga:.2f}", f"{statistics.median(took):.3f}", f"{took[0]:.3f}"))  # fmt: skip
    return rows, ("kind", "parameters", "tokens", "GFLOP a picture", "CPU s, median", "least")


def measure(
    demo: Path, out: Path, kind: str, visual_tokens: str, steps: int, scenes: list[Scene]
) -> tuple[object, ...]:
    run = out / f"{visual_tokens}-{kind}"
    before = _cpu_seconds()
    _run("train", "run", "--features", demo / "features/train", "--eval-features", demo / "features/held-out",
         "--llm", MODELS / "llm", "--out", run, "--projector", kind, "--visual-tokens", visual_tokens,
         "--max-steps", steps, "--epochs", 99, "--eval-every", steps, "--device", "cpu")  # fmt: skip
    seconds = _cpu_seconds() - before
    _run("infer", "batch", "--checkpoint", run / "last", "--vision", MODELS / "vision", "--llm",
         MODELS / "llm", "--batch-size", 64, "--device", "cpu",
         "--input", out / "questions.jsonl", "--output", run / "answers.jsonl")  # fmt: skip
    answers = [line["answer"] for line in read_json_lines(run / "answers.jsonl")]
    right = accuracy(scenes, answers)
    metrics = read_json_lines(run / "metrics.jsonl")
    rates = [line for line in metrics if "samples_per_s" in line]
    card = json.loads((run / "last/metrics.json").read_text())
    return (
        f"{visual_tokens}, {kind}",
        f"{parameter_count(load_checkpoint(run / 'last').projector):,}",
        f"{statistics.median(line['samples_per_s'] for line in rates):.0f}",
        f"{seconds:.0f}",
        f"{statistics.median(line['data_wait'] for line in rates):.2%}",
        f"{card['eval_loss']:.3f}",
        f"{card['eval_grounding_gap']:.3f}",
        *(f"{right[attribute]:.1%}" for attribute in ("shape", "colour", "place", "all")),
    )


def _cpu_seconds() -> float:
    """User and system time of the commands so far: what a busy machine distorts least."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
