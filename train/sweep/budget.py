"""`--budget`: what each trial of a sweep may spend."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from llava_core.errors import LlavaError

Unit = Literal["steps", "flops", "seconds"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Optimizer steps, needed operations (train.flops) or seconds of training for each trial."""

    unit: Unit
    amount: float

    @staticmethod
    def of(text: str) -> Budget:
        """From `unit=amount`. Raises LlavaError (wrong usage) for anything else."""
        unit, _, word = text.partition("=")
        try:
            amount = float(word)
        except ValueError:
            amount = math.nan
        if unit not in get_args(Unit) or not 0 < amount < math.inf or (unit == "steps" and amount % 1):
            expected = "steps=N (whole), flops=N such as 2e15, or seconds=N, above 0"
            raise LlavaError("--budget", expected=expected, got=text or "nothing", exit_code=2)
        return Budget(unit, amount)  # type: ignore[arg-type]

    @property
    def by_cost(self) -> bool:
        """Whether trials of unlike cost get unlike numbers of steps."""
        return self.unit != "steps"

    def __str__(self) -> str:
        short = f"{self.amount:.0f}" if self.unit == "steps" else f"{self.amount:g}".replace("e+", "e")
        return f"{self.unit}={short if float(short) == self.amount else repr(self.amount)}"
