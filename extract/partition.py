"""Which part of the files is this worker's, when a launcher has started many.

`RANK` and `WORLD_SIZE` (torchrun, and any other launcher) or a SLURM array say it. Where both do, as in an
array whose tasks each run torchrun, they multiply: every rank of every task is a worker of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from extract.config import Encoding
from llava_core.device import whole_number
from llava_core.errors import LlavaError

T = TypeVar("T")
Flags = TypeVar("Flags", bound=Encoding)


@dataclasses.dataclass(frozen=True)
class Share:
    """Worker `index` (from 0) of `of`."""

    index: int = 0
    of: int = 1

    def take(self, things: Sequence[T]) -> list[T]:
        """Every `of`-th, so that no two workers meet on one and none is left out."""
        return list(things[self.index :: self.of])

    def limits(self, config: Flags) -> Flags:
        """The same flags with this worker's part of what all together may ask of one host."""
        rate = config.host_rate and config.host_rate / self.of
        return dataclasses.replace(config, per_host=max(1, config.per_host // self.of), host_rate=rate)


def share_of(environment: Mapping[str, str]) -> Share:
    """Raises LlavaError (wrong usage) if the variables make no sense."""
    rank, task = _rank(environment), _array_task(environment)
    return Share(task.index * rank.of + rank.index, task.of * rank.of)


def _rank(environment: Mapping[str, str]) -> Share:
    index, of = whole_number(environment, "RANK"), whole_number(environment, "WORLD_SIZE")
    if index is None and of is None:
        return Share()
    if index is None or of is None or not 0 <= index < of:
        raise LlavaError(
            "RANK and WORLD_SIZE make no sense",
            expected="RANK from 0 to WORLD_SIZE - 1",
            got=f"RANK={_shown(index)}, WORLD_SIZE={_shown(of)}",
            do="set both, or neither",
            exit_code=2,
        )
    return Share(index, of)


def _array_task(environment: Mapping[str, str]) -> Share:
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    task, first, last, count, step = (whole_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in names)
    if task is None:
        return Share()
    first, step = first or 0, 1 if step is None else step
    steps = None if last is None or step < 1 else (last - first) // step + 1
    of = steps if count is None else count
    # An array such as 1,5,7 has a count of its own: none of its tasks can tell how many came before it.
    regular = step >= 1 and (task - first) % step == 0 and steps in (None, of)
    if of is None or not regular or not 0 <= (task - first) // step < of:
        raise LlavaError(
            "the SLURM array makes no sense as shares of the files",
            expected="--array=0-15, or 0-30:2",
            got=f"task {task} from {first} to {_shown(last)} by {step}, {_shown(count)} in all",
            do="submit a whole range (finished files cost seconds), or unset SLURM_ARRAY_TASK_ID",
            exit_code=2,
        )
    return Share((task - first) // step, of)


def _shown(value: int | None) -> str:
    return "unset" if value is None else str(value)
