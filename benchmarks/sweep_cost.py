"""What a sweep of short runs costs, extraction included, beside as many runs of a course's trainer.

    python -m benchmarks.sweep_cost                       # the demo's models
    python -m benchmarks.sweep_cost --shape reference     # ViT-B/16 and Qwen3-0.6B's shapes, random weights
    python -m benchmarks.sweep_cost --beside runs         # our own `train run`, and --together

Ours: `extract run` of images over HTTP, then `train sweep` over the learning rate. The course's: for each
rate a process that loads the models, downloads, decodes in full and encodes every image in every run
(DataLoader workers), pads its batches, and takes transformers' loss over every logit. One after the other,
in one run, from the same server; CPU time is that of the processes and their children, without the server.
Ours judges each run by held-out images, too, before its first step and after its last; the course's does not.
`--beside runs` compares, on the same features, as many `train run` with `train sweep` and `train sweep
--together`, one after the other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.datasets import Pictures
from benchmarks.photo_server import DRAWN, photo, serving
from benchmarks.train import SENTENCES, captions
from benchmarks.trainers import course_loader, course_pass
from llava_align.config import MODELS
from llava_align.synthetic_reference import write_language_model, write_vision
from llava_core.cli.console import table
from llava_core.device import pick_device
from llava_core.filesystem import read_json_lines
from llava_core.language.instructions import CHINESE
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation, Turn
from llava_core.projector.projector import build_projector
from llava_core.vision.open import open_vision_tower

HELD_OUT = 32
"""Images by which ours judges each run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    shape: Literal["small", "reference"] = "reference" if torch.cuda.is_available() else "small"
    """The demo's models, or ViT-B/16 and Qwen3-0.6B's true shapes with random weights."""
    runs: int = 16
    samples: int = 256
    """Images, each of which a run sees once."""
    batch_size: int = 16
    latency: float = 0.05
    """Seconds that the server waits before it answers."""
    width: int = 2250
    height: int = 1500
    workers: int = 8
    """Of the course's DataLoader."""
    together: int = 1
    """As of `train sweep`."""
    beside: Literal["course", "runs"] = "course"
    """The course's trainer, or our own separate runs and sweeps that train several together."""
    course: Path | None = None
    """Folder in which one run of the course's trainer is made, as this benchmark starts it."""
    lr: float = 1e-3
    """Of that run."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.course is not None:
        return course_run(settings, settings.course)
    with tempfile.TemporaryDirectory() as folder:
        compare(settings, Path(folder))
    return None


def compare(settings: Settings, folder: Path) -> None:
    for name, write in {"vision": write_vision, "llm": write_language_model}.items():
        if settings.shape == "reference":
            write(folder / name)
        else:
            (folder / name).symlink_to((MODELS / name).absolute())
    drawn = [photo(settings.width, settings.height, seed) for seed in range(DRAWN)]
    words = captions(settings.samples + HELD_OUT, SENTENCES[settings.shape])
    rates = [f"{10 ** (-4 + 2 * k / max(1, settings.runs - 1)):.2e}" for k in range(settings.runs)]
    flags = [f"--{name}={getattr(settings, name)}" for name in ("samples", "batch_size", "workers")]
    with serving(drawn, settings.latency) as base:
        rows = [{"url": f"{base}/{i}", "caption": text} for i, text in enumerate(words)]
        extracted = []
        for name, part in (("train", rows[HELD_OUT:]), ("held-out", rows[:HELD_OUT])):
            data = folder / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in part))
            extract = ("extract", "run", "--data", data, "--vision", folder / "vision", "--allow-private")
            extracted.append(timed(*extract, "--per-host", 64, "--out", folder / "features" / name))
        if settings.beside == "runs":
            return compare_runs(settings, folder, rates)
        swept = sweep(settings, folder, rates, settings.together)
        course = [timed("benchmarks.sweep_cost", "--course", folder, "--lr", lr, *flags) for lr in rates]
    kinds = {
        "extract run": extracted,
        f"train sweep, {settings.runs} runs": [swept],
        "ours": [*extracted, swept],
        f"the course's, {settings.runs} runs": course,
    }
    *_, ours, theirs = printed(settings, kinds)
    print(f"ours / the course's: wall 1/{theirs[0] / ours[0]:.1f}, CPU 1/{theirs[1] / ours[1]:.1f}")


def compare_runs(settings: Settings, folder: Path, rates: list[str]) -> None:
    """Print what separate runs take, and sweeps that train 1, 2, 4, 8, 16 and `auto` together."""
    common = flags_of(settings, folder)
    runs = [timed("train", "run", *common, "--out", folder / "runs" / lr, "--lr", lr) for lr in rates]
    numbers = [1, *(k for k in (2, 4, 8, 16) if k <= settings.runs), "auto"]
    swept = {f"--together {k}": [sweep(settings, folder, rates, k)] for k in numbers}
    alone, *sweeps = printed(settings, {f"train run, {settings.runs} times": runs, **swept})
    ratios = [f"{wall / alone[0]:.2f} {cpu / alone[1]:.2f}" for wall, cpu in sweeps]
    print(f"sweeps / runs, wall and CPU: {', '.join(ratios)}")


def flags_of(settings: Settings, folder: Path) -> list[object]:
    """Flags of `train run` and `train sweep` alike."""
    train, held_out = folder / "features/train", folder / "features/held-out"
    data = ["--features", train, "--eval-features", held_out, "--llm", folder / "llm"]
    return [*data, "--batch-size", settings.batch_size, "--eval-captions", 0]


def sweep(settings: Settings, folder: Path, rates: list[str], together: int | str) -> tuple[float, float]:
    out, space = folder / f"sweep-{together}", f"lr={','.join(rates)}"
    common = flags_of(settings, folder)
    return timed("train", "sweep", *common, "--out", out, "--together", together, "--space", space)


def printed(settings: Settings, kinds: dict[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Print the sums of these wall and CPU seconds; returns them."""
    print(f"{settings}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    sums = {kind: (sum(w for w, _ in some), sum(c for _, c in some)) for kind, some in kinds.items()}
    taken = [(kind, f"{wall:.1f}", f"{cpu:.1f}") for kind, (wall, cpu) in sums.items()]
    print(table(taken, ("", "wall, s", "CPU, s")))
    return list(sums.values())


def timed(module: str, *arguments: object) -> tuple[float, float]:
    """Wall and CPU seconds of a command. Raises CalledProcessError if it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def course_run(settings: Settings, folder: Path) -> None:
    device = pick_device("auto")
    rows = read_json_lines(folder / "train.jsonl")
    tower, llm = open_vision_tower(folder / "vision", device), load_language_model(folder / "llm", device)
    projector = build_projector("linear", tower.width, llm.hidden).to(device)
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    size = settings.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    words = [conversation.example([Turn(CHINESE[0], row["caption"])], max_answer_tokens=512) for row in rows]
    pictures = Pictures([row["url"] for row in rows], words.__getitem__, tower)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.lr, weight_decay=0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    loader = course_loader(pictures, batches, settings.workers, llm)
    course_pass(llm, tower, projector, loader, update)
    torch.save(projector.state_dict(), folder / f"course-{settings.lr}.pt")


if __name__ == "__main__":
    main()
