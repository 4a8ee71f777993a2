"""Trainers beside ours: a course project's, with images or cached features, and transformers'."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from benchmarks.datasets import Collate
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE
from llava_core.vision.tower import VisionTower
from train.data.samples import Samples
from train.loop import Trainer as Ours
from train.model.blocks import original_attention
from train.optimizer import build_optimizers
from train.stop_signal import StopRequest
from train.throughput import peak_memory
from train.training_run import TrainingRun


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


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each batch and the seconds until it came."""
    iterator = iter(batches)
    while True:
        before = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - before


def course_loader(
    dataset: Dataset[Any], batches: Sequence[list[int]], workers: int, llm: LanguageModel
) -> DataLoader[Any]:
    """These batches, padded to their longest."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=Collate(min(llm.eos_ids)),
        pin_memory=llm.device.type == "cuda",
    )


def course_pass(
    llm: LanguageModel,
    tower: VisionTower,
    projector: torch.nn.Module,
    loader: DataLoader[Any],
    update: Callable[[], None],
) -> Pass:
    """Every batch once, by the loss of transformers over every logit; `update` takes the gradients."""
    waiting = encoding = 0.0
    losses = []
    began = time.perf_counter()
    for batch, waited in timed(loader):
        waiting += waited
        pictures, ids, labels, mask = batch
        features, seconds = encoded(tower, pictures)
        encoding += seconds
        loss = padded_loss(llm, projector, features, ids, labels, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        update()
        losses.append(loss.item())
    return Pass(time.perf_counter() - began, waiting, encoding, peak(llm.device), losses[0])


def encoded(tower: VisionTower, pictures: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Features of pictures, as they are cached, and the seconds that took; features stay as they are."""
    if pictures.dtype != torch.uint8:
        return pictures, 0.0
    before = time.perf_counter()
    features = tower.encode(pictures).half()
    synchronise(tower.device)
    return features, time.perf_counter() - before


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
    cpu: float = 0.0
    """CPU seconds, if measured."""


@dataclasses.dataclass
class Bench:
    """One pass of each kind, all from the same weights and in the same order."""

    workers: int
    """Of the DataLoader."""
    tower: VisionTower
    run: TrainingRun

    def __post_init__(self) -> None:
        self._initial = [parameter.detach().clone() for parameter in self.run.parameters]

    @torch.no_grad()
    def reset(self) -> None:
        """All that trains as it was at first, and nothing left of an optimizer."""
        run = self.run
        run.optimizers = build_optimizers(run.config, run.projector, run.tuning.parameters)
        for parameter, initial in zip(run.parameters, self._initial, strict=True):
            parameter.copy_(initial)
            parameter.grad = None
        run.tuning.after_step()
        run.step = 0
        reset_peak(run.llm.device)

    @property
    def samples(self) -> Samples:
        return self.run.samples

    def work(self) -> tuple[int, int]:
        """Needed operations, and real tokens, of all samples once."""
        batches = [self.samples.batch([i], epoch=0) for i in range(len(self.samples))]
        operations = sum(self.run.operations(batch.counts) for batch in batches)
        return operations, sum(b.features.shape[1] + len(b.examples[0].ids) for b in batches)

    def ours(self, steps: int) -> Pass:
        run, waiting = self.run, 0.0
        losses: list[torch.Tensor] = []
        resources = run.resources
        packing = resources.packing(run.config.micro_tokens)
        trainer = Ours({0: run}, resources, packing, StopRequest())
        self.reset()
        device = run.llm.device
        began = time.perf_counter()
        batches = trainer.batches(run.schedule.steps)
        for batch, waited in timed(batches):
            waiting += waited
            losses += trainer.train_step(batch)
            if len(losses) == steps:
                break
        batches.close()
        synchronise(device)  # a step waits for nothing
        return Pass(time.perf_counter() - began, waiting, 0.0, peak(device), float(losses[0]))

    def transformers_trainer(self, dataset: Dataset[Any], steps: int) -> Pass:
        """By transformers' own Trainer, padded; its loss over every logit. Its model encodes pictures."""
        llm, projector, tower = self.run.llm, self.run.projector, self.tower
        losses: list[torch.Tensor] = []
        encoding = 0.0

        class Aligned(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.projector = projector

            def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
                nonlocal encoding
                features, *words = (batch[name] for name in names)
                features, seconds = encoded(tower, features)
                encoding += seconds
                loss = padded_loss(llm, projector, features, *words)
                losses.append(loss.detach())
                return {"loss": loss}

        names, collate = ("features", "ids", "labels", "mask"), Collate(min(llm.eos_ids))
        with tempfile.TemporaryDirectory() as folder, original_attention(llm):
            trainer = Trainer(
                Aligned(),
                TrainingArguments(
                    folder,
                    max_steps=steps,
                    per_device_train_batch_size=self.run.config.batch_size,
                    learning_rate=self.run.config.lr,
                    dataloader_num_workers=self.workers,
                    remove_unused_columns=False,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=llm.device.type == "cpu",
                ),
                train_dataset=dataset,
                data_collator=lambda pairs: dict(zip(names, collate(pairs), strict=True)),
            )
            self.reset()
            began = time.perf_counter()
            trainer.train()
            synchronise(llm.device)
        return Pass(time.perf_counter() - began, 0.0, encoding, peak(llm.device), float(losses[0]))

    def course(self, dataset: Dataset[Any], steps: int) -> Pass:
        """Batches padded to their longest; the loss of transformers over every logit."""
        run = self.run
        llm, schedule, config = run.llm, run.schedule, run.config
        rates = (config.lr, 0.0 if config.lr_llm is None else config.lr_llm)
        groups = zip((run.projector.parameters(), run.tuning.parameters), rates, strict=True)
        self.reset()
        optimizer = torch.optim.AdamW(
            [{"params": some, "lr": lr} for parameters, lr in groups if (some := [*parameters])],
            weight_decay=0,
        )

        def update() -> None:
            if config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(run.parameters, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            run.tuning.after_step()

        batches = [schedule.at(step)[1] for step in range(steps)]
        loader = course_loader(dataset, batches, self.workers, llm)
        with original_attention(llm):
            return course_pass(llm, self.tower, run.projector, loader, update)
