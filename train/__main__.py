"""`python -m train` and `llava-train`."""

from __future__ import annotations

import os
import signal
import time

from llava_core.cli import command
from llava_core.cli.console import silence
from llava_core.cli.options import Command
from train.config import EvalConfig, PlanConfig, RunConfig
from train.recipes import RECIPES
from train.sweep.config import ScalingConfig, SweepConfig

CACHES = "--features features/train --eval-features features/eval --llm models/qwen3"
"""Features and a language model, as the examples name them."""
COMMANDS = {
    "run": Command(
        RunConfig,
        "train.run:run",
        RECIPES,
        continues=True,
        example=f"{CACHES} --out runs/linear --recipe fast --max-steps 1250",
    ),
    "sweep": Command(
        SweepConfig,
        "train.sweep.command:run",
        RECIPES,
        continues=True,
        example=f"{CACHES} --out runs/sweep --space lr=5e-4,1e-3 projector=linear,mlp",
    ),
    "scaling": Command(
        ScalingConfig,
        "train.sweep.command:run",
        RECIPES,
        continues=True,
        example=f"{CACHES} --out runs/law --sizes 1k,2k,4k,8k",
    ),
    "plan": Command(
        PlanConfig,
        "train.cost_prediction:run",
        RECIPES,
        example=f"{CACHES} --out runs/linear",
    ),
    "eval": Command(
        EvalConfig,
        "train.evaluate:run",
        example="runs/linear/best --features features/eval --llm models/qwen3",
        subject="checkpoint",
    ),
}
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which its processes find each other."""


def main() -> None:
    # torchrun started several of us, and rank 0 speaks; RANK or WORLD_SIZE alone are left over from something
    spoken_for = os.environ.get("RANK", "0") != "0" and all(os.environ.get(name) for name in TORCHRUN)
    if spoken_for:
        silence()
    try:
        command.main("python -m train", "Train projectors on cached features.", COMMANDS)
    except SystemExit as leaving:
        if spoken_for and leaving.code in (1, 2):
            for signum in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            time.sleep(1)  # torchrun ends all as soon as one has ended, and rank 0 may have yet to speak
        raise


if __name__ == "__main__":
    main()
