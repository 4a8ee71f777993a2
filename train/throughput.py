"""Throughput, data wait and memory of a run, measured per step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

import torch

from llava_core.cli.console import human_bytes
from llava_core.device import utilisation, utilisation_shown
from llava_core.types import JsonDict
from train.data.batch import Batch


class Throughput:
    """Rates since the last restart; `matmul_rate` is the machine's own, in operations per second."""

    def __init__(self, device: torch.device, matmul_rate: float) -> None:
        self.device, self.matmul_rate = device, matmul_rate
        self.total_steps, self.total_seconds = 0, 0.0
        """Steps and seconds up to the last `rates`, evaluations and checkpoints left out."""
        self.started, self.waited = time.perf_counter(), 0.0
        self.steps = self.samples = self.tokens = self.operations = 0

    def restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.steps = self.samples = self.tokens = self.operations = 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the wait for each is added up."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - before
            yield batch

    def count(self, samples: int, tokens: int, operations: int) -> None:
        """Add one step's samples, tokens and needed operations."""
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.operations += operations

    def rates(self) -> JsonDict:
        """Samples and tokens per second, model FLOPs utilisation (None if it would be over 1), share of time
        spent waiting for data, and peak memory in bytes; then restart."""
        seconds = time.perf_counter() - self.started
        self.total_steps += self.steps
        self.total_seconds += seconds
        share = utilisation(self.operations, seconds, self.matmul_rate)
        rates = {
            "samples_per_s": round(self.samples / seconds, 2),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "mfu": None if share is None else round(share, 4),
            "data_wait": round(self.waited / seconds, 5),
            "memory_bytes": peak_memory(self.device),
        }
        self.restart()
        return rates


def progress_line(metrics: JsonDict) -> str:
    """Loss and rates on one line, beside a progress bar that has steps and the time left."""
    return (
        f"loss {metrics['loss']:.3f}, lr {metrics['lr']:.1e}, {metrics['samples_per_s']:.0f} samples/s, "
        f"{metrics['tokens_per_s']:,.0f} tokens/s, MFU {utilisation_shown(metrics['mfu'])}, "
        f"waits {metrics['data_wait']:.1%}, {human_bytes(metrics['memory_bytes'])}"
    )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of tensors on a GPU; resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
