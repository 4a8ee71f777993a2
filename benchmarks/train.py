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
import io
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.extract import DRAWN, header, photo, serving, with_comment
from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_align.synthetic_reference import write_language_model, write_vision
from llava_core.cli.console import human_bytes, table
from llava_core.device import pick_device, utilisation, utilisation_shown
from llava_core.language.conversation import IGNORE, Example
from llava_core.language.model import LanguageModel
from llava_core.row_status import Status
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower
from train.config import Compile, RunConfig
from train.data.prefetch import prefetch
from train.data.samples import Samples
from train.distributed import World
from train.model.packed_model import own_attention
from train.resources import Shared
from train.run import Trainer as Ours
from train.run_folder import RunFolder
from train.throughput import peak_memory
from train.training_run import Member

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


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one kind took for all samples once."""

    seconds: float
    waiting: float
    """Seconds until batches came."""
    encoding: float
    """Seconds in the vision encoder."""
    peak: int
    first_loss: float


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
                passes[kind].append(measure(bench.member.schedule.steps))
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
        member = Member(config, RunFolder(config.out, config), Shared(config, World()))
        return Bench(settings, tower, member, copy.deepcopy(member.projector.state_dict()))

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
        if settings.compile != "off" and bench.member.llm.device.type == "cuda":
            kinds["(f) ours, not compiled"] = bench_of("off").ours
        kinds["(d) ours"] = bench.ours
        yield bench, kinds


def report(settings: Settings, bench: Bench, passes: dict[str, list[Pass]]) -> None:
    member = bench.member
    operations, tokens = bench.work()
    rate, rows = member.prediction.matmul_rate, []
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


@dataclasses.dataclass
class Bench:
    """One pass of each kind, all from the same projector and in the same order."""

    settings: Settings
    tower: VisionTower
    member: Member
    initial: dict[str, torch.Tensor]

    @property
    def samples(self) -> Samples:
        return self.member.samples

    def work(self) -> tuple[int, int]:
        """Needed operations, and real tokens, of all samples once."""
        batches = [self.samples.batch([i], epoch=0) for i in range(self.settings.samples)]
        operations = sum(self.member.operations(batch.examples) for batch in batches)
        return operations, sum(b.features.shape[1] + len(b.examples[0].ids) for b in batches)

    def ours(self, steps: int) -> Pass:
        member, waiting, losses = self.member, 0.0, []
        trainer = Ours({0: member}, member.shared)
        member.step = 0
        member.projector.load_state_dict(self.initial)
        device = member.llm.device
        reset_peak(device)
        began = time.perf_counter()
        batches = prefetch(self.samples, member.schedule, 0, device.type == "cuda", World())
        for batch, waited in timed(batches):
            waiting += waited
            losses += trainer.train_step([member], iter([batch]), []).losses
            if len(losses) == steps:
                break
        batches.close()
        return Pass(time.perf_counter() - began, waiting, 0.0, peak(device), losses[0])

    def transformers_trainer(self, steps: int) -> Pass:
        """Cached features by transformers' own Trainer, padded; its loss over every logit."""
        llm = self.member.llm
        losses: list[torch.Tensor] = []
        projector = copy.deepcopy(self.member.projector)
        projector.load_state_dict(self.initial)

        class Aligned(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.projector = projector

            def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
                loss = padded_loss(llm, projector, *(batch[name] for name in names))
                losses.append(loss.detach())
                return {"loss": loss}

        names, collate = ("features", "ids", "labels", "mask"), Collate(min(llm.eos_ids))
        with tempfile.TemporaryDirectory() as folder, own_attention(llm):
            trainer = Trainer(
                Aligned(),
                TrainingArguments(
                    folder,
                    max_steps=steps,
                    per_device_train_batch_size=self.settings.batch_size,
                    learning_rate=self.member.config.lr,
                    dataloader_num_workers=self.settings.workers,
                    remove_unused_columns=False,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=llm.device.type == "cpu",
                ),
                train_dataset=Cached(self.samples),
                data_collator=lambda pairs: dict(zip(names, collate(pairs), strict=True)),
            )
            reset_peak(llm.device)
            began = time.perf_counter()
            trainer.train()
            synchronise(llm.device)
        return Pass(time.perf_counter() - began, 0.0, 0.0, peak(llm.device), float(losses[0]))

    def course(self, dataset: Dataset[Any], steps: int) -> Pass:
        """Batches padded to their longest; the loss of transformers over every logit."""
        llm, schedule = self.member.llm, self.member.schedule
        projector = copy.deepcopy(self.member.projector)
        projector.load_state_dict(self.initial)
        optimizer = torch.optim.AdamW(projector.parameters(), lr=self.member.config.lr, weight_decay=0)
        loader = DataLoader(
            dataset,
            batch_sampler=[schedule.at(step)[1] for step in range(steps)],
            num_workers=self.settings.workers,
            collate_fn=Collate(min(llm.eos_ids)),
            pin_memory=llm.device.type == "cuda",
        )
        waiting = encoding = 0.0
        losses = []
        reset_peak(llm.device)
        began = time.perf_counter()
        with own_attention(llm):
            for batch, waited in timed(loader):
                waiting += waited
                pictures, ids, labels, mask = batch
                if pictures.dtype == torch.uint8:
                    before = time.perf_counter()
                    pictures = self.tower.encode(pictures).half()  # as the features that are cached
                    synchronise(llm.device)
                    encoding += time.perf_counter() - before
                loss = padded_loss(llm, projector, pictures, ids, labels, mask)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return Pass(time.perf_counter() - began, waiting, encoding, peak(llm.device), losses[0])


def padded_loss(
    llm: LanguageModel, projector: torch.nn.Module, features: torch.Tensor, *words: torch.Tensor
) -> torch.Tensor:
    """transformers' own loss over every logit; `words` are ids, labels and mask [batch, longest]."""
    ids, labels, mask = words
    visual = projector(features.to(llm.device).float()).to(llm.dtype)
    kept = torch.ones(visual.shape[:2], dtype=mask.dtype, device=llm.device)
    unlearnt = torch.full(visual.shape[:2], IGNORE, device=llm.device)
    loss: torch.Tensor = llm.model(
        inputs_embeds=torch.cat([visual, llm.embed(ids.to(llm.device))], dim=1),
        attention_mask=torch.cat([kept, mask.to(llm.device)], dim=1),
        labels=torch.cat([unlearnt, labels.to(llm.device)], dim=1),
        use_cache=False,
    ).loss
    return loss


@dataclasses.dataclass
class Pictures(Dataset[Any]):
    """Downloaded or read, decoded in full and resized, where the trainer waits for it."""

    addresses: Sequence[str]
    samples: Samples
    tower: VisionTower

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Example]:
        address = self.addresses[self.samples.rows[index][1]]
        if address.startswith("http"):
            with urllib.request.urlopen(address) as answer:
                content = answer.read()
        else:
            content = Path(address).read_bytes()
        size = self.tower.preprocess.size
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)), self.samples.example(index, epoch=0)


@dataclasses.dataclass
class Cached(Dataset[Any]):
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Example]:
        batch = self.samples.batch([index], epoch=0)
        return batch.features[0], batch.examples[0]


@dataclasses.dataclass(frozen=True)
class Collate:
    padding: int

    def __call__(self, pairs: list[tuple[torch.Tensor, Example]]) -> tuple[torch.Tensor, ...]:
        """Pictures or features, and ids, labels and mask [batch, longest]."""
        longest = max(len(example.ids) for _, example in pairs)
        rows: list[tuple[list[int], list[int], list[int]]] = []
        for _, example in pairs:
            empty = longest - len(example.ids)
            rows.append(
                (
                    example.ids + [self.padding] * empty,
                    example.labels + [IGNORE] * empty,
                    [1] * len(example.ids) + [0] * empty,
                )
            )
        return torch.stack([picture for picture, _ in pairs]), *map(torch.tensor, zip(*rows, strict=True))


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


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch and the seconds until it came."""
    iterator = iter(batches)
    while True:
        before = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - before


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew


def peak(device: torch.device) -> int:
    """Since `reset_peak`, without the DataLoader's workers."""
    if device.type == "cuda":
        return peak_memory(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
