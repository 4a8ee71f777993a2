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
from train.watch.config import WatchConfig

COMMANDS = {
    "run": Command(RunConfig, "train.run:run", RECIPES, continues=True),
    "sweep": Command(SweepConfig, "train.sweep.command:run", RECIPES, continues=True),
    "scaling": Command(ScalingConfig, "train.sweep.command:run", RECIPES, continues=True),
    "plan": Command(PlanConfig, "train.cost_prediction:run", RECIPES),
    "eval": Command(EvalConfig, "train.evaluate:run"),
    "watch": Command(WatchConfig, "train.watch.command:run"),
}
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which its processes find each other."""


def main() -> None:
    # torchrun started several of us, and rank 0 speaks; RANK or WORLD_SIZE alone are left over from something
    spoken_for = os.environ.get("RANK", "0") != "0" and all(os.environ.get(name) for name in TORCHRUN)
    if spoken_for:
        silence()
    try:
        command.main("llava-train", "Train projectors on cached features.", COMMANDS)
    except SystemExit as leaving:
        if spoken_for and leaving.code in (1, 2):
            for signum in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            time.sleep(1)  # torchrun ends all as soon as one has ended, and rank 0 may have yet to speak
        raise


if __name__ == "__main__":
    main()
