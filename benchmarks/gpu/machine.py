"""What the machine is, and its ceilings."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator

import torch
import transformers

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import Clock, Row, median_of, row
from benchmarks.gpu.worker import PACKAGES
from llava_align.doctor.command import driver
from llava_core import __version__
from llava_core.device import default_dtype
from llava_core.launcher_variables import cpu_cores


def versions() -> Iterator[Row]:
    found = {
        "llava-align": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "CPU cores": str(cpu_cores()),
    }
    if torch.cuda.is_available():
        found |= {"GPU": torch.cuda.get_device_name(), "NVIDIA driver": driver()}
    modules = sum(name.split(".")[0] in PACKAGES for name in sys.modules)
    for name, value in {**found, "product modules imported": str(modules)}.items():
        yield Row(name, value)


def ceilings(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Matrix products, copies, the launch of one small operation, a loop in Python."""
    device, share = bench.device, clock.left / 6
    dtype, size = default_dtype(device), bench.sizes.matmul
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = median_of(device, lambda: a @ b, share, times=5)
    rates = [2 * size**3 / seconds for seconds in taken]
    bench.ceilings["matmul"] = sorted(rates)[len(rates) // 2]
    name = f"{size}³ {str(dtype).removeprefix('torch.')} matrix product"
    yield row(name, [rate / 1e12 for rate in rates], "TFLOP/s", "798 (H100), 788 (H200)")
    count = (1 << 28) if device.type == "cuda" else (1 << 22)
    source, target = (torch.ones(count, device=device) for _ in range(2))
    taken = median_of(device, lambda: target.copy_(source), share, times=3)
    rates = [8 * count / seconds for seconds in taken]
    bench.ceilings["copy"] = sorted(rates)[len(rates) // 2]
    yield row(
        "copy on the device, read + written",
        [rate / 1e12 for rate in rates],
        "TB/s",
        "3.0 (H100), 4.3 (H200)",
    )
    if device.type == "cuda":
        for pinned in (True, False):
            host = torch.ones(1 << 26, pin_memory=pinned)
            taken = median_of(device, lambda host=host: host.to(device, non_blocking=True), share)  # type: ignore[misc]
            rates = [4 * (1 << 26) / seconds / 1e9 for seconds in taken]
            yield row(f"copy to the device, {'pinned' if pinned else 'pageable'}", rates, "GB/s")
    small = torch.ones(8, device=device)
    taken = median_of(device, lambda: small.add_(1), share, times=2000)
    yield row("one small operation, launched", [1e6 * seconds for seconds in taken], "µs", "about 3")
    loops = 10**6
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(loops):
            pass
        taken.append((time.perf_counter() - began) / loops)
    yield row("one turn of a loop in Python", [1e9 * seconds for seconds in taken], "ns")
