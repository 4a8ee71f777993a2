"""Devices: choice, default dtype, free memory, measured matmul rate and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import functools
import os
import re
import time
from pathlib import Path

import torch

from llava_core.cli.console import say
from llava_core.errors import MEMORY_ERRORS
from llava_core.gpu_drivers import require_device
from llava_core.launcher_variables import local_gpu

DEVICE_ERRORS = re.compile(r"CUDA (driver )?error|cuDNN error|CUBLAS_STATUS|device-side assert")
LEAST_PRODUCTS = 8
"""Fewest matrix products that are timed, however long they take."""


def pick_device(name: str) -> torch.device:
    """`auto` -> an NVIDIA (or ROCm) GPU if there is one, else the CPU.

    An Apple GPU (mps) is used on request only: no release of this project was tested on one. Raises
    LlavaError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            say("computing on the CPU; --device mps takes this Mac's GPU, which has not been tested")
    require_device(name, {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available})
    if name == "cuda" and torch.cuda.device_count() > 1:
        return torch.device("cuda", local_gpu(os.environ, torch.cuda.device_count()))
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """Type of a language model's weights: bf16 on a GPU that computes in it, else fp32.

    GPUs before Ampere (compute capability 8.0) only emulate bf16. fp16 would not do instead: the activations
    of language models trained in bf16 exceed its range, and gradients need scaling to stay in it.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return torch.bfloat16
    return torch.float32


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Type of a vision encoder's weights: as `default_dtype`, but fp16 on Volta and Turing GPUs.

    An encoder takes no gradients, and its features are stored in fp16; those that overflow are counted as
    not finite. GPUs before Volta (compute capability 7.0) are slower in fp16 than in fp32.
    """
    dtype = default_dtype(device)
    if (
        dtype == torch.float32
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
    ):
        return torch.float16
    return dtype


def is_device_failure(error: Exception) -> bool:
    """Whether the device itself failed (a CUDA, cuDNN or cuBLAS error), so that other work fails too."""
    named = getattr(torch, "AcceleratorError", None)  # torch >= 2.8
    return (named is not None and isinstance(error, named)) or bool(DEVICE_ERRORS.search(str(error)))


def is_memory_full(error: Exception) -> bool:
    """Whether a device's memory was too small."""
    return isinstance(error, torch.OutOfMemoryError) or bool(MEMORY_ERRORS.search(str(error)))


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that are free or reclaimable, within the limits of all control groups (cgroups)."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *_group_rooms(root)])


def _group_rooms(root: Path) -> list[int]:
    """Bytes that each control group of this process (version 2 or 1) has left; empty without limits."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's; the container's own group is then the top.
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                rooms.append(max(0, int(limit) - int(used) + int(stat.get(names[2], 0))))
    return rooms


def on_its_way(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` of the CPU on `device`; to a GPU they go from pinned memory, while the host goes on."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type == "cuda")


class Later:
    """Numbers that a device still computes, to be read when it has been given more to do."""

    def __init__(self, values: torch.Tensor) -> None:
        on_gpu = values.device.type == "cuda"
        self._values = values.detach().to("cpu", non_blocking=on_gpu)  # into pinned memory
        self._copied = torch.cuda.current_stream(values.device).record_event() if on_gpu else None

    def read(self) -> torch.Tensor:
        """The numbers, on the CPU, as soon as they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


@functools.lru_cache(maxsize=4)
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of large matrix products: the best of several, measured for about `seconds`.

    On a CPU time is CPU time divided by the number of threads, since wall time on a busy machine includes
    other processes. If some of torch's threads stay idle, the rate comes out too high.
    """
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype, generator=generator)

    def timed() -> float:
        cpu, wall = time.process_time(), time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        wall = time.perf_counter() - wall
        if device.type != "cpu":
            return wall
        return min(wall, (time.process_time() - cpu) / torch.get_num_threads())

    timed()
    end, best, count = time.perf_counter() + seconds, float("inf"), 0
    while time.perf_counter() < end or count < LEAST_PRODUCTS:
        best, count = min(best, timed()), count + 1
    return 2 * size**3 / best


def utilisation(operations: float, seconds: float, rate: float) -> float | None:
    """Model FLOPs utilisation: `operations` per `seconds` as a share of `rate`, a device's FLOP/s.

    None for a share above 1, which means that the rate was measured too low.
    """
    share = operations / seconds / rate
    return share if share <= 1 else None


def utilisation_shown(share: float | None) -> str:
    """The share as text, such as "38%"."""
    return "unknown (over 100%: the matmul rate was measured too low)" if share is None else f"{share:.0%}"
