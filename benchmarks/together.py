"""Runs of a sweep in one pass through the language model, beside the same runs one by one.

    python -m benchmarks.together --features DIR --llm DIR [--members 1 2 4 8]

For each number K of members: K runs that differ in their learning rates, K at a time and one at a time, in
turns, several times. Loading, which both share, and evaluation, which is the same for both, are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro

from llava_core.cli.console import table
from llava_core.device import pick_device
from llava_core.errors import LlavaError
from train.config import RunConfig
from train.resources import TrainingResources
from train.run import train
from train.throughput import peak_memory


@dataclasses.dataclass(frozen=True)
class Settings:
    features: Path
    """Folder of feature shards."""
    llm: Path
    """Folder of the language model."""
    members: tuple[int, ...] = (1, 2, 4, 8)
    batch_sizes: tuple[int, ...] = (4, 16)
    steps: int = 20
    """Of each run."""
    repeat: int = 3
    device: str = "auto"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = config(settings, Path(folder), settings.batch_sizes[0])
        resources = TrainingResources(first, repeated=True)
        seconds = functools.partial(seconds_together, Path(folder), resources)
        for batch_size in settings.batch_sizes:
            one = config(settings, Path(folder), batch_size)
            seconds([one])
            for members in settings.members:
                runs = [dataclasses.replace(one, lr=1e-3 * (k + 1)) for k in range(members)]
                passes = [
                    (seconds(runs), sum(seconds([run]) for run in runs)) for _ in range(settings.repeat)
                ]
                joint, alone = (statistics.median(side) for side in zip(*passes, strict=True))
                row = (batch_size, members, f"{joint:.2f}", f"{alone:.2f}", f"{alone / joint:.2f}")
                rows.append((*row, f"{peak_memory(resources.device) / 1e6:.0f}"))
                print(*rows[-1], flush=True)
    device = pick_device(settings.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{device}, {name}, {settings.steps} steps, medians of {settings.repeat}")
    print(table(rows, ("batch size", "runs", "together, s", "one by one, s", "ratio", "peak MB so far")))


def seconds_together(folder: Path, resources: TrainingResources, runs: list[RunConfig]) -> float:
    """Seconds to train these runs in one pass each step, in new folders inside `folder`."""
    at = tempfile.mkdtemp(dir=folder)
    fresh = [dataclasses.replace(run, out=Path(at) / str(number)) for number, run in enumerate(runs)]
    started = time.perf_counter()
    if failed := [outcome for outcome in train(fresh, resources) if isinstance(outcome, LlavaError)]:
        raise failed[0]
    return time.perf_counter() - started


def config(settings: Settings, folder: Path, batch_size: int) -> RunConfig:
    return RunConfig(
        features=settings.features,
        llm=settings.llm,
        out=folder / "run",
        batch_size=batch_size,
        max_steps=settings.steps,
        epochs=99,
        micro_tokens=1 << 20,
        device=settings.device,  # type: ignore[arg-type]
    )


if __name__ == "__main__":
    main()
