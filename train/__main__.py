"""`python -m train` and `llava-train`."""

from __future__ import annotations

from llava_core import cli
from train.config import EvalConfig, PlanConfig, RunConfig

COMMANDS = {
    "run": cli.Command(RunConfig, "train.run:run"),
    "plan": cli.Command(PlanConfig, "train.plan:run"),
    "eval": cli.Command(EvalConfig, "train.evaluate:run"),
}


def main() -> None:
    cli.main("llava-train", "Train projectors on cached features.", COMMANDS)


if __name__ == "__main__":
    main()
