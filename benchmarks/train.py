"""Our trainer beside the ways people train a projector, on the same samples in one run.

    python -m benchmarks.train                              # the demo's models
    python -m benchmarks.train --shape reference            # ViT-B/16 and Qwen3-0.6B's shapes, random weights
    python -m benchmarks.train --tune llm --batch-size 4    # stage 2, as the course trains it

(a) live encoder, images downloaded over HTTP and decoded in full in DataLoader workers, padded batches,
    logits of the whole vocabulary at every position with transformers' own loss: a faithful course trainer
(b) the same with JPEGs on the local disk
(c) features from our shards, but the padded step of (a)
(d) ours
With --trainer, (a), (b) and (c) also in the loop of transformers' own Trainer, which orders samples anew and
does not tell how long it waits.
They take turns, `--repeat` times each; ratios are those of medians. Stages: waiting for data, encoding
images, and the rest, which is the step through the language model. Stage 2 reads dialogues instead of
captions, and has no (b). Peak memory is with the vision encoder, though (c) and (d) need none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.utils.data import Dataset

from benchmarks.datasets import Cached, Pictures
from benchmarks.extract import header
from benchmarks.photo_server import DRAWN, photo, serving, with_comment
from benchmarks.trainers import Bench, Pass
from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.dialogues import training_dialogues
from llava_align.demo.world.scene import random_scene
from llava_align.synthetic_reference import write_language_model, write_vision
from llava_core.cli.console import human_bytes, table
from llava_core.device import pick_device, utilisation, utilisation_shown
from llava_core.row_status import Status
from llava_core.shards.dialogue import turns_to_text
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower
from train.config import Compile, RunConfig, Tune
from train.recipes import RECIPES
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
    tune: Tune = "projector"
    """As of `train run`; lora and llm with the flags of its recipe course-stage2."""
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
    """As of `train run`; on a GPU, unless off, ours without it is measured too, in stage 1."""
    trainer: bool = False
    """Add transformers' own Trainer on each of these data."""


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
                before = cpu_seconds()
                one = measure(bench.run.schedule.steps)
                passes[kind].append(dataclasses.replace(one, cpu=cpu_seconds() - before))
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
    stage2 = settings.tune != "projector"
    words = dialogues(settings.samples) if stage2 else captions(settings.samples, SENTENCES[settings.shape])
    write_shard(tower, paths, words, stage2, folder / "features/a.h5")
    recipe = RECIPES["course-stage2"] | {"tune": settings.tune, "decay": "linear"} if stage2 else {}

    def bench_of(compiled: Compile) -> Bench:
        flags = recipe | {"batch_size": settings.batch_size, "device": settings.device, "compile": compiled}
        config = RunConfig(features=folder / "features", llm=llm, out=folder / f"run-{compiled}", **flags)
        run = TrainingRun(config, RunFolder(config.out, config), TrainingResources(config))
        return Bench(settings.workers, tower, run)

    with serving(drawn, settings.latency) as base:
        urls = [f"{base}/{i}" for i in range(settings.samples)]
        bench = bench_of(settings.compile)
        example = functools.partial(bench.samples.example, epoch=0)
        data: dict[str, Dataset[Any]] = {
            "(a) course, HTTP": Pictures(urls, example, tower),
            "(b) course, local JPEGs": Pictures(paths, example, tower),
            "(c) cached, padded": Cached(bench.samples),
        }
        if stage2:
            del data["(b) course, local JPEGs"]
        kinds: dict[str, Callable[[int], Pass]] = {
            name: functools.partial(bench.course, dataset) for name, dataset in data.items()
        }
        if settings.trainer:
            kinds |= {
                f"{name[:3]} by transformers' Trainer": functools.partial(bench.transformers_trainer, dataset)
                for name, dataset in data.items()
            }
        if settings.compile != "off" and not stage2 and bench.run.llm.device.type == "cuda":
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
                f"{1000 * statistics.median(p.cpu for p in some) / settings.samples:.1f}",
                f"{tokens / median[kind]:.0f}",
                utilisation_shown(utilisation(operations, median[kind], rate)),
                human_bytes(max(p.peak for p in some)),
                f"{waiting:.1%} / {encoding:.1%} / {1 - waiting - encoding:.1%}",
                f"{some[0].first_loss:.4f}",
            )
        )
    speed = ("samples/s", "slowest – fastest", "CPU, ms a sample", "real tokens/s", "MFU")
    print(f"{settings}, {torch.get_num_threads()} threads, matmul {rate / 1e12:.3g} TFLOP/s")
    print(table(rows, ("", *speed, "peak memory", "data/encode/step", "first loss")))
    *others, ours = median
    for kind in others:
        print(f"{ours} / {kind}: {median[kind] / median[ours]:.2f}")


def cpu_seconds() -> float:
    """Of this process and its workers that have ended, without the server of the pictures."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def captions(n: int, sentences: int) -> list[str]:
    """Of the demo's world."""
    rng = random.Random(0)
    return ["".join(caption(random_scene(rng), rng) for _ in range(sentences)) for _ in range(n)]


def dialogues(n: int) -> list[str]:
    """Stored dialogues of the demo's world, of several turns in two languages."""
    rng = random.Random(0)
    made = training_dialogues([Path(str(i)) for i in range(n)], [random_scene(rng) for _ in range(n)], rng)
    spoken = [turns for picture, turns in made.values() if picture is not None][:n]
    return [turns_to_text([(turn.question, turn.answer) for turn in turns]) for turns in spoken]


def write_shard(
    tower: VisionTower, paths: Sequence[str], words: Sequence[str], conversations: bool, path: Path
) -> None:
    """The pictures' features, with these words."""
    head = dataclasses.replace(header(tower, words, list(paths)), conversations=conversations)
    with ShardWriter(path, head) as writer:
        for row, name in enumerate(paths):
            pixels = tower.preprocess.decode_image(Path(name).read_bytes()).pixels
            features = tower.encode(pixels[None]).half().cpu().numpy()[0]
            writer.write([RowRecord(row, Status.OK, features)])
        writer.finish()


if __name__ == "__main__":
    main()
