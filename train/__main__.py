"""`python -m train` and `llava-train`."""

from __future__ import annotations

import os
import signal
import time

from llava_core import cli
from llava_core.console import silence
from train.config import EvalConfig, PlanConfig, RunConfig, SweepConfig
from train.recipe import RECIPES

COMMANDS = {
    "run": cli.Command(RunConfig, "train.run:run", RECIPES, continues=True),
    "sweep": cli.Command(SweepConfig, "train.sweep:run", RECIPES, continues=True),
    "plan": cli.Command(PlanConfig, "train.plan:run", RECIPES),
    "eval": cli.Command(EvalConfig, "train.evaluate:run"),
}


def main() -> None:
    spoken_for = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK") != "0"
    if spoken_for:  # torchrun started several of us, and rank 0 speaks
        silence()
    try:
        cli.main("llava-train", "Train projectors on cached features.", COMMANDS)
    except SystemExit as leaving:
        if spoken_for and leaving.code == 2:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(1)  # torchrun ends all as soon as one has ended, and rank 0 may have yet to speak
        raise


if __name__ == "__main__":
    main()
