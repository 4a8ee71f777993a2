"""One trial of a sweep, as tables, plots and the page show it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from llava_core.filesystem import read_json_lines
from llava_core.types import JsonDict
from train.sweep.space import Point

State = Literal["finished", "pruned", "failed", "running", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Record:
    """A trial and its outcome so far."""

    number: int
    state: State
    point: Point
    folder: Path
    loss: float | None = None
    """Held-out loss of its last evaluation, in nats per answer token."""
    lowest: float | None = None
    """Lowest held-out loss of its evaluations after the first step."""
    summary: JsonDict = dataclasses.field(default_factory=dict)
    """Summary of its run, once it has ended."""
    seconds: float = 0.0
    """Time spent on it; of trials trained together, an equal share."""
    error: str | None = None
    """Why it failed."""

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, held-out loss) of each evaluation, from the run's metrics."""
        try:
            metrics = read_json_lines(self.folder / "metrics.jsonl")
        except (OSError, ValueError):
            return []
        losses = [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]
        return [(step, loss) for step, loss in losses if math.isfinite(loss)]
