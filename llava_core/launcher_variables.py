"""Rank, world size, GPU and CPU cores of this worker, from its launcher's variables (torchrun, SLURM)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from llava_core.errors import LlavaError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class WorkerIndex:
    """Worker `rank` (from 0) of `world_size`."""

    rank: int = 0
    world_size: int = 1


def worker_index(environment: Mapping[str, str] = os.environ) -> WorkerIndex:
    """This worker's rank and world size: each rank (RANK, WORLD_SIZE) of each task of a SLURM array is one.

    Raises LlavaError (wrong usage) if the variables make no sense.
    """
    rank, task = _rank(environment), _array_task(environment)
    return WorkerIndex(task.rank * rank.world_size + rank.rank, task.world_size * rank.world_size)


def _rank(environment: Mapping[str, str]) -> WorkerIndex:
    index, of = whole_number(environment, "RANK"), whole_number(environment, "WORLD_SIZE")
    if index is None and of is None:
        return WorkerIndex()
    if index is None or of is None or not 0 <= index < of:
        raise LlavaError(
            "RANK and WORLD_SIZE make no sense",
            expected="RANK from 0 to WORLD_SIZE - 1",
            got=f"RANK={_shown(index)}, WORLD_SIZE={_shown(of)}",
            do="set both, or neither",
            exit_code=2,
        )
    return WorkerIndex(index, of)


def _array_task(environment: Mapping[str, str]) -> WorkerIndex:
    names = ("ID", "MIN", "MAX", "COUNT", "STEP")
    task, first, last, count, step = (whole_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in names)
    if task is None:
        return WorkerIndex()
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
    return WorkerIndex((task - first) // step, of)


def _shown(value: int | None) -> str:
    return "unset" if value is None else str(value)


def local_gpu(environment: Mapping[str, str], visible: int) -> int:
    """Index of this worker's GPU among `visible`: LOCAL_RANK (torchrun) or SLURM_LOCALID, else 0.

    If there are more workers than GPUs, they share them. Raises LlavaError (wrong usage) for anything but
    a number from 0 on.
    """
    name = "LOCAL_RANK" if environment.get("LOCAL_RANK") else "SLURM_LOCALID"
    value = environment.get(name) or "0"
    if not value.isdecimal():
        raise LlavaError(name, expected="a whole number from 0 on", got=value, exit_code=2)
    return int(value) % visible


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """An integer variable; None if unset or empty. Raises LlavaError (wrong usage) for anything else."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    try:
        return int(value)
    except ValueError:
        raise LlavaError(name, expected="a whole number", got=value, exit_code=2) from None


def usable_cores() -> int:
    """CPU cores that this process may run on; of systems that cannot tell, such as macOS, all cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_cores(environment: Mapping[str, str] = os.environ) -> int:
    """CPU cores of this process: `usable_cores`, divided by torchrun's LOCAL_WORLD_SIZE."""
    beside = environment.get("LOCAL_WORLD_SIZE", "")
    return max(1, usable_cores() // max(1, int(beside) if beside.isdecimal() else 1))
