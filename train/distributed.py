"""Several processes started by torchrun, each with a model and a GPU of its own, that train one projector.

Every rank takes a shard of each step's samples, and one exchange per step sums counts, gradients and losses.
DistributedDataParallel would do the same and hide the exchange behind the backward pass; but the projector's
gradient is the last thing that pass yields, so there is nothing to hide it behind. Ranks without a sample,
gradient accumulation, and a stop of all ranks at once need no special case here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from llava_core.cli.console import speak
from llava_core.device import is_memory_full, pick_device
from llava_core.errors import LlavaError, first_line
from llava_core.launcher_variables import whole_number
from train.stop_signal import ignore_signals

Item = TypeVar("Item")


@contextlib.contextmanager
def joined() -> Iterator[ProcessGroup]:
    """The processes that torchrun started, joined for the block; without torchrun a group of this one."""
    size = whole_number(os.environ, "WORLD_SIZE")
    if size is None or size == 1:
        yield ProcessGroup()
        return
    ours = not dist.is_initialized()  # else by whoever calls, or by an earlier run that failed
    try:  # tensors on a GPU travel by NCCL, all others by gloo
        if ours:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        speak()  # there is no rank 0 to print it
        raise LlavaError(
            f"cannot join the {size} processes that WORLD_SIZE promises",
            got=first_line(error),
            do="start them with torchrun, or, for one process, `unset WORLD_SIZE RANK`",
        ) from None
    yield ProcessGroup(dist.get_rank(), size)
    if ours:
        dist.destroy_process_group()


class DeferredError:
    """A `with` block whose LlavaError, OSError, interrupt or lack of memory waits in `error` until the ranks
    next meet."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> DeferredError:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        known = isinstance(error, (LlavaError, OSError, KeyboardInterrupt))
        if known or (isinstance(error, RuntimeError) and is_memory_full(error)):
            self.error = error
        return self.error is not None


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """This process among all. Every rank must call the methods that communicate in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """True on the one rank that writes."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """`pick_device`, a GPU of its own for each process of a machine."""
        device = pick_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if device.type == "mps":
            raise LlavaError("--device mps", expected="one process", got=self.size, do="use --device cpu")
        local = whole_number(os.environ, "LOCAL_RANK") or 0
        if local >= torch.cuda.device_count():
            raise LlavaError(
                "more processes than GPUs",
                expected=f"--nproc-per-node {torch.cuda.device_count()} or less",
                got=f"a process with LOCAL_RANK {local}",
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def shard(self, items: Sequence[Item], cost: Callable[[Item], int] | None = None) -> list[Item]:
        """This rank's items: counts differ by one at most, and sums of `cost` by little. May be empty."""
        if self.size == 1:
            return list(items)
        if cost is not None:
            items = sorted(items, key=cost, reverse=True)
        rounds = [items[start : start + self.size] for start in range(0, len(items), self.size)]
        # Dealt to and fro, so that no rank always gets the dearest of a round.
        places = [self.rank if k % 2 == 0 else self.size - 1 - self.rank for k in range(len(rounds))]
        return [dealt[place] for dealt, place in zip(rounds, places, strict=True) if place < len(dealt)]

    def sum(self, *values: float) -> list[float]:
        """Sums over the ranks, in double precision."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        with _others():
            dist.all_reduce(summed)
        return summed.tolist()

    @torch.no_grad()
    def exchange(
        self, means: Sequence[torch.Tensor], weight: float, sums: Sequence[float], error: BaseException | None
    ) -> list[float]:
        """Turn `means`, in place, into their means over the ranks by `weight`; return the sums of `sums`.

        Raises, on every rank, the first `error` that one of them has. The host's numbers are summed by
        themselves, so that nothing waits for a device.
        """
        total, failed, *summed = self.sum(weight, error is not None, *sums)
        if failed:
            self.fail_all(error)
        if self.size > 1:
            flat = torch.cat([mean.flatten() * weight for mean in means])
            with _others():
                dist.all_reduce(flat)
            for mean, part in zip(means, torch.split(flat, [mean.numel() for mean in means]), strict=True):
                mean.copy_((part / total).view_as(mean))
        return summed

    def from_main(self, state: dict[str, Any]) -> dict[str, Any]:
        """The main rank's state, tensors on the CPU."""
        buffer = io.BytesIO()
        if self.main:
            torch.save(state, buffer)
        box = [buffer.getvalue()]
        with _others():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        received: dict[str, Any] = torch.load(io.BytesIO(box[0]), map_location="cpu", weights_only=True)
        return received

    @contextlib.contextmanager
    def same_outcome(self) -> Iterator[None]:
        """An error that one rank meets inside the block is raised on every rank after it."""
        if self.size == 1:
            yield
            return
        with DeferredError() as deferred:
            yield
        if self.sum(deferred.error is not None)[0]:
            self.fail_all(deferred.error)

    def fail_all(self, error: BaseException | None) -> NoReturn:
        """Called on every rank: raise the same error on all, the first that one of them has."""
        errors = [error]
        if self.size > 1:
            ignore_signals()
            errors = [None] * self.size
            with _others():
                dist.all_gather_object(errors, error)
        first = next(error for error in errors if error is not None)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows as the cause
            line = str(first) or "interrupted"
            cause = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
            Path(path).write_text(json.dumps({"message": cause}))
        raise first


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LlavaError(
            "another process of this run has ended",
            got=first_line(error),
            do="look for its own message; the same command continues",
        ) from None
