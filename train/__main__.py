"""`python -m train` and `llava-train`."""

from __future__ import annotations

import os

from llava_core import cli
from llava_core.console import silence
from train.config import EvalConfig, RunConfig

COMMANDS = {
    "run": cli.Command(RunConfig, "train.run:run"),
    "eval": cli.Command(EvalConfig, "train.evaluate:run"),
}


def main() -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun's; rank 0 speaks for all
        silence()
    cli.main("llava-train", "Train projectors on cached features.", COMMANDS)


if __name__ == "__main__":
    main()
