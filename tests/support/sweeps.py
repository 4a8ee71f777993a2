"""A sweep of short runs, for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from tests.support.runs import config, flags_of
from train.sweep.config import SweepConfig


def sweep(world: Path, out: Path, *space: str, **flags: Any) -> SweepConfig:
    """Of runs of 12 steps, evaluated every 4."""
    base = config(world, out, epochs=1, eval_every=4, eval_captions=0, log_every=4)
    return SweepConfig(**{**vars(base), **flags}, space=space)


def command(given: SweepConfig) -> list[str]:
    flags = flags_of(dataclasses.replace(given, space=()))
    at = flags.index("--space")
    return ["train", "sweep", *flags[:at], *flags[at + 1 :], "--space", *given.space]


def results(out: Path) -> dict[int, dict[str, Any]]:
    """Trial -> its line, the best first."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["trial"]: line for line in lines}
