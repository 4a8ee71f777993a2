"""Our trainer beside the ways people train a projector, on the same samples in one run.

    python -m benchmarks.train                              # the demo's models
    python -m benchmarks.train --shape reference            # ViT-B/16 and Qwen3-0.6B's shapes, random weights

(a) live encoder, images downloaded over HTTP and decoded in full in DataLoader workers, padded batches,
    logits of the whole vocabulary at every position with transformers' own loss: a faithful course trainer
(b) the same with JPEGs on the local disk
(c) features from our shards, but the padded step of (a)
(d) ours
The four take turns, `--repeat` times each; ratios are those of medians. Stages: waiting for data, encoding
images, and the rest, which is the step through the language model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.extract import header
from benchmarks.photo_server import DRAWN, photo, serving, with_comment
from benchmarks.trainers import (
    Bench,
    Cached,
    Pass,
    Pictures,
)
from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_align.synthetic_reference import write_language_model, write_vision
from llava_core.cli.console import human_bytes, table
from llava_core.device import pick_device, utilisation, utilisation_shown
from llava_core.row_status import Status
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower
from train.config import Compile, RunConfig
from train.resources import TrainingResources
from train.run_folder import RunFolder
from train.training_run import TrainingRun

SENTENCES = {"small": 1, "reference": 6}
"""Captions of the demo's world that make one caption: the reference's have about 130 tokens."""


@dataclasses.dataclass(frozen=True)
class Settings:
    shape: Literal["small", "reference"] = "reference" if torch.cuda.is_available() else "small"
    """The demo's models, or ViT-B/16 and Qwen3-0.6B's true shapes with random weights."""
    samples: int = 64
    """Samples a pass."""
    batch_size: int = 16
    repeat: int = 3
    """Passes of each kind."""
    latency: float = 0.05
    """Seconds that the server waits before it answers."""
    width: int = 2250
    height: int = 1500
    workers: int = os.cpu_count() or 1
    """Of the DataLoader."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Compile = "auto"
    """As of `train run`; on a GPU, unless off, ours without it is measured too."""
    trainer: bool = False
    """Add transformers' own Trainer."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        compare(settings, Path(folder))


def compare(settings: Settings, folder: Path) -> None:
    vision, llm = MODELS / "vision", MODELS / "llm"
    if settings.shape == "reference":
        vision, llm = folder / "vision", folder / "llm"
        write_vision(vision)
        write_language_model(llm)
    with open_bench(settings, folder, vision, llm) as (bench, kinds):
        for warm_up in kinds.values():
            warm_up(1)
        passes: dict[str, list[Pass]] = {kind: [] for kind in kinds}
        for _ in range(settings.repeat):
            for kind, measure in kinds.items():
                passes[kind].append(measure(bench.run.schedule.steps))
    report(settings, bench, passes)


@contextlib.contextmanager
def open_bench(
    settings: Settings, folder: Path, vision: Path, llm: Path
) -> Iterator[tuple[Bench, dict[str, Callable[[int], Pass]]]]:
    """Our bench, and each kind by its name, ours last: a function of how many steps it makes."""
    tower = open_vision_tower(vision, pick_device(settings.device))
    drawn = [photo(settings.width, settings.height, seed) for seed in range(DRAWN)]
    (folder / "jpegs").mkdir(parents=True)
    paths = [str(folder / f"jpegs/{i}") for i in range(settings.samples)]
    for i, path in enumerate(paths):
        Path(path).write_bytes(with_comment(drawn[i % DRAWN], i))
    write_shard(tower, paths, SENTENCES[settings.shape], folder / "features/a.h5")

    def bench_of(compiled: Compile) -> Bench:
        config = RunConfig(
            features=folder / "features",
            llm=llm,
            out=folder / f"run-{compiled}",
            batch_size=settings.batch_size,
            device=settings.device,
            compile=compiled,
        )
        run = TrainingRun(config, RunFolder(config.out, config), TrainingResources(config))
        return Bench(settings.workers, tower, run, copy.deepcopy(run.projector.state_dict()))

    with serving(drawn, settings.latency) as base:
        urls = [f"{base}/{i}" for i in range(settings.samples)]
        bench = bench_of(settings.compile)
        kinds: dict[str, Callable[[int], Pass]] = {
            "(a) course, HTTP": lambda steps: bench.course(Pictures(urls, bench.samples, tower), steps),
            "(b) course, local JPEGs": lambda steps: bench.course(
                Pictures(paths, bench.samples, tower), steps
            ),
            "(c) cached, padded": lambda steps: bench.course(Cached(bench.samples), steps),
        }
        if settings.trainer:
            kinds["(e) cached, transformers' Trainer"] = bench.transformers_trainer
        if settings.compile != "off" and bench.run.llm.device.type == "cuda":
            kinds["(f) ours, not compiled"] = bench_of("off").ours
        kinds["(d) ours"] = bench.ours
        yield bench, kinds


def report(settings: Settings, bench: Bench, passes: dict[str, list[Pass]]) -> None:
    run = bench.run
    operations, tokens = bench.work()
    rate, rows = run.prediction.matmul_rate, []
    median = {kind: statistics.median(p.seconds for p in some) for kind, some in passes.items()}
    for kind, some in passes.items():
        whole = sum(p.seconds for p in some)
        waiting, encoding = sum(p.waiting for p in some) / whole, sum(p.encoding for p in some) / whole
        slow, fast = max(p.seconds for p in some), min(p.seconds for p in some)
        rows.append(
            (
                kind,
                f"{settings.samples / median[kind]:.2f}",
                f"{settings.samples / slow:.2f} – {settings.samples / fast:.2f}",
                f"{tokens / median[kind]:.0f}",
                utilisation_shown(utilisation(operations, median[kind], rate)),
                human_bytes(max(p.peak for p in some)),
                f"{waiting:.1%} / {encoding:.1%} / {1 - waiting - encoding:.1%}",
                f"{some[0].first_loss:.4f}",
            )
        )
    columns = ("samples/s", "slowest – fastest", "real tokens/s", "MFU", "peak memory", "data/encode/step")
    print(f"{settings}, {torch.get_num_threads()} threads, matmul {rate / 1e12:.3g} TFLOP/s")
    print(table(rows, ("", *columns, "first loss")))
    *others, ours = median
    for kind in others:
        print(f"{ours} / {kind}: {median[kind] / median[ours]:.2f}")


def write_shard(tower: VisionTower, paths: Sequence[str], sentences: int, path: Path) -> None:
    """The pictures' features, with captions of the demo's world."""
    rng = random.Random(0)
    words = ["".join(caption(random_scene(rng), rng) for _ in range(sentences)) for _ in paths]
    with ShardWriter(path, header(tower, words, list(paths))) as writer:
        for row, name in enumerate(paths):
            pixels = tower.preprocess.decode_image(Path(name).read_bytes()).pixels
            features = tower.encode(pixels[None]).half().cpu().numpy()[0]
            writer.write([RowRecord(row, Status.OK, features)])
        writer.finish()


if __name__ == "__main__":
    main()
