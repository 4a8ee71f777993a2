"""Writes the golden curve anew: python -m tests.golden.write. For changes that are meant to move it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.support.runs import LOSS_CURVE, config, curve, write_runs
from train.run import run


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = write_runs(Path(folder))
        run(config(world, world / "run"))
        LOSS_CURVE.write_text(json.dumps([round(loss, 6) for loss in curve(world / "run").values()]) + "\n")


if __name__ == "__main__":
    main()
