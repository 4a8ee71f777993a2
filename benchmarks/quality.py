"""How few steps reach the loss of the course's recipe: python -m benchmarks.quality

    --features DIR --eval-features DIR --llm DIR    # the demo's, in demo-out, if not given

The target is the held-out loss of `--recipe course` after one epoch (or --steps). Every other row trains
for a share of these steps, its schedule ending there: its loss is that of a finished run. Each row is run
with several seeds (of initialisation, order and questions); the table gives the median and the range.
Seconds are CPU time, which neighbours distort least, and include solving or measuring before the first step.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from llava_align.config import MODELS
from llava_core.projector.projector import Projector
from train.config import RunConfig
from train.data.batch import answer_tokens
from train.data.packing import Packing
from train.data.samples import Samples
from train.data.schedule import Schedule
from train.distributed import ProcessGroup, joined
from train.evaluate import evaluate
from train.initialization import (
    OUTPUT_RMS_RATIO,
    RIDGE,
    Moments,
    initial_projector,
    layer_input,
    solve_captions,
)
from train.model.loss import packed_losses
from train.optimizer import build_optimizers, learning_rate
from train.recipes import RECIPES
from train.resources import TrainingResources


@dataclasses.dataclass(frozen=True)
class Settings:
    features: Path = Path("demo-out/features/train")
    eval_features: Path = Path("demo-out/features/held-out")
    llm: Path = MODELS / "llm"
    steps: int | None = None
    """Of the course's run; one epoch if not given."""
    max_samples: int = 100_000
    eval_samples: int = 256
    seeds: int = 3
    rows: tuple[str, ...] = ()
    """Only rows whose names begin so."""
    visual_tokens: Literal["all", "patches", "pool", "shuffle"] = "all"
    """Of every row that names none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    share: int
    """Divides the course's steps."""
    flags: dict[str, Any]
    """Of `train run`."""
    rms_ratio: float = OUTPUT_RMS_RATIO
    ridge: float = RIDGE
    momentum: float | None = None
    """Of Muon, other than its own."""
    whiten: bool = False
    """Train on features of mean 0 and covariance 1, and fold that into the weights at the end."""
    short_first: bool = False
    """Take the samples of the run in the order of their captions' lengths."""
    constant: bool = False
    """The rate stays where the warm-up brought it."""
    batches: tuple[int, ...] = ()
    """Sizes of the steps' batches one after the other, each for an equal share of the run's samples."""


COURSE, FAST = RECIPES["course"], RECIPES["fast"]
ROWS = (
    Row("course", 1, COURSE),
    Row("course, 1/5", 5, COURSE),
    Row("default", 1, {}),
    Row("default, 1/5", 5, {}),
    Row("fast", 1, FAST),
    Row("fast, 1/5", 5, FAST),
    Row("fast, 1/6", 6, FAST),
    Row("fast, 1/10", 10, FAST),
    Row("only captions, 1/5", 5, {**COURSE, "start": "captions"}),
    Row("only captions, lr 5e-4, 1/5", 5, {**COURSE, "start": "captions", "lr": 5e-4}),
    Row("only captions, lr 8e-3, 1/5", 5, {**COURSE, "start": "captions", "lr": 8e-3}),
    Row("only muon, 1/5", 5, {**FAST, "start": "scale"}),
    Row("only whitened, 1/5", 5, COURSE, whiten=True),
    Row("only whitened, lr 5e-4, 1/5", 5, {**COURSE, "lr": 5e-4}, whiten=True),
    Row("only whitened, lr 8e-3, 1/5", 5, {**COURSE, "lr": 8e-3}, whiten=True),
    Row("fast, whitened, 1/5", 5, FAST, whiten=True),
    Row("fast, whitened, lr 0.2, 1/5", 5, {**FAST, "lr": 0.2}, whiten=True),
    Row("fast, loudness 1, 1/5", 5, FAST, rms_ratio=1.0),
    Row("fast, ridge 0.1, 1/5", 5, FAST, ridge=0.1),
    Row("fast, ridge 1e-5, 1/5", 5, FAST, ridge=1e-5),
    Row("fast, momentum 0.95, 1/5", 5, FAST, momentum=0.95),
    Row("fast, lr 0.1, 1/5", 5, {**FAST, "lr": 0.1}),
    Row("fast, lr 0.02, 1/5", 5, {**FAST, "lr": 0.02}),
    Row("fast, cosine decay", 1, {**FAST, "decay": "cosine"}),
    Row("fast, cosine decay, 1/5", 5, {**FAST, "decay": "cosine"}),
    Row("fast, no decay, 1/5", 5, FAST, constant=True),
    Row("fast, warm-up 0, 1/5", 5, {**FAST, "warmup": 0.0}),
    Row("fast, warm-up 10 %, 1/5", 5, {**FAST, "warmup": 0.1}),
    Row("course, lr 5e-4, 1/5", 5, {**COURSE, "lr": 5e-4}),
    Row("course, lr 8e-3, 1/5", 5, {**COURSE, "lr": 8e-3}),
    Row("course, lr 3e-2, 1/5", 5, {**COURSE, "lr": 3e-2}),
    Row("fast, short first, 1/5", 5, FAST, short_first=True),
    Row("fast, batch 8, 2/5", 5, {**FAST, "batch_size": 8}),
    Row("fast, batch 32, 1/10", 5, {**FAST, "batch_size": 32}),
    Row("fast, batch 8 to 32, 1/5", 5, FAST, batches=(8, 32)),
    Row("fast, batch 32 to 8, 1/5", 5, FAST, batches=(32, 8)),
    Row("mlp, course", 1, {**COURSE, "projector": "mlp"}),
    Row("mlp, fast, 1/5", 5, {**FAST, "projector": "mlp"}),
    Row("mlp, fast, 1/4", 4, {**FAST, "projector": "mlp"}),
    Row("pool, course", 1, {**COURSE, "visual_tokens": "pool"}),
    Row("pool, fast, 1/5", 5, {**FAST, "visual_tokens": "pool"}),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    loss: float
    steps: int
    seconds: float


def main() -> None:
    given = tyro.cli(Settings, description=__doc__)
    rows = [row for row in ROWS if not given.rows or row.name.startswith(given.rows)]
    config = RunConfig(
        features=given.features,
        eval_features=given.eval_features,
        llm=given.llm,
        out=Path("unused"),
        max_samples=given.max_samples,
        eval_samples=given.eval_samples,
        visual_tokens=given.visual_tokens,
        device=given.device,
        resident="ram",
    )
    with joined() as group:
        resources = TrainingResources(config, group, repeated=True)
        print(line("", "", "steps", "loss", "", "CPU s"), flush=True)
        target: float | None = None
        for row in rows:
            flags = dataclasses.replace(config, **row.flags)
            outcomes = [
                race(row, dataclasses.replace(flags, seed=seed), resources, group, given.steps)
                for seed in range(given.seeds)
            ]
            losses = [outcome.loss for outcome in outcomes]
            loss = statistics.median(losses)
            target = loss if row.name == "course" else target
            print(
                line(
                    row.name,
                    "reached" if target is not None and loss <= target else "",
                    str(outcomes[0].steps),
                    f"{loss:.4f}",
                    f"{min(losses):.4f}–{max(losses):.4f}",
                    f"{statistics.median(outcome.seconds for outcome in outcomes):.1f}",
                ),
                flush=True,
            )


def line(name: str, reached: str, steps: str, loss: str, losses: str, seconds: str) -> str:
    return f"{name:28} {steps:>6} {loss:>8} {losses:15} {seconds:>7} {reached}".rstrip()


def race(
    row: Row, config: RunConfig, resources: TrainingResources, group: ProcessGroup, course_steps: int | None
) -> Outcome:
    """Train as `row` says; the loss of the finished projector."""
    resources.cache_features(config)
    samples, held_out = resources.samples(config)
    assert held_out is not None
    course = course_steps or -(-len(samples) // int(COURSE["batch_size"]))
    steps = round(course / row.share * COURSE["batch_size"] / config.batch_size)
    order = Schedule(len(samples), config.batch_size, 1 + steps, steps, config.seed)
    taken = [(epochs[0], indices) for epochs, indices in map(order.at, range(steps))]
    if row.short_first:
        taken = short_first(taken, samples)
    if row.batches:
        taken = in_batches(taken, row.batches)
    samples.batch(taken[0][1], 0)  # what is loaded once is not counted
    began = time.process_time()
    solved = config.start == "captions"
    before = dataclasses.replace(config, start="torch") if solved else config
    projector = initial_projector(before, samples, resources.llm)
    if solved:
        solve_captions(projector, samples, resources.llm, row.ridge, row.rms_ratio)
    model: torch.nn.Module = projector
    if row.whiten:
        model = Whitened(projector, samples, resources.device)
    visual, packing = projector.tokens_out(samples.tokens), Packing(config.micro_tokens)
    (optimizer,) = build_optimizers(config, projector)
    if row.momentum is not None:
        optimizer.param_groups[0]["momentum"] = row.momentum
    for step, (epoch, indices) in enumerate(taken):
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate(row, config, step, len(taken))
        batch = samples.batch(indices, epoch)
        answers = answer_tokens(batch.examples)
        for laid in packing.rows(batch.to(resources.device), [visual]):
            (loss,) = packed_losses(resources.llm, [model], laid)
            (loss / answers).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(model, Whitened):
        model.fold()
    seconds = time.process_time() - began
    figures = evaluate(resources.llm, projector, held_out, 32, packing, group).figures
    return Outcome(figures["loss"], len(taken), seconds)


def rate(row: Row, config: RunConfig, step: int, steps: int) -> float:
    """Learning rate of step number `step` (from 0) of `steps`."""
    after = row.constant and step >= round(config.warmup * steps)
    return config.lr if after else learning_rate(config, step, steps)


def short_first(taken: list[tuple[int, list[int]]], samples: Samples) -> list[tuple[int, list[int]]]:
    """The same samples, the shortest captions in the first steps."""
    size = len(taken[0][1])
    flat = sorted((index for _, indices in taken for index in indices), key=samples.text_bytes)
    return [(0, flat[k : k + size]) for k in range(0, len(flat), size)]


def in_batches(taken: list[tuple[int, list[int]]], sizes: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """The same samples in the same order, an equal share of them in batches of each size."""
    flat = [(epoch, index) for epoch, indices in taken for index in indices]
    share = -(-len(flat) // len(sizes))
    regrouped = []
    for part, size in enumerate(sizes):
        of = flat[part * share : (part + 1) * share]
        for k in range(0, len(of), size):
            regrouped.append((of[k][0], [index for _, index in of[k : k + size]]))
    return regrouped


class Whitened(torch.nn.Module):
    """A projector whose first linear layer sees whitened features (ZCA), until `fold` undoes it.

    Before and after, the function is the same; between, steps are taken in the whitened coordinates.
    """

    def __init__(self, projector: Projector, samples: Samples, device: torch.device) -> None:
        super().__init__()
        self.projector = projector
        self.layer = next(m for m in projector.modules() if isinstance(m, torch.nn.Linear))
        moments = Moments()
        for index in range(0, min(512, len(samples)), 32):
            features = samples.read(range(index, min(index + 32, len(samples)))).to(device).float()
            seen = layer_input(projector, self.layer, features)
            moments.add(seen, seen.new_zeros(len(seen), 1))
        covariance = moments.covariance
        covariance.diagonal().add_(0.01 * covariance.diagonal().mean())
        values, vectors = torch.linalg.eigh(covariance)
        self.mean = moments.x_mean
        self.matrix = ((vectors * values.rsqrt()) @ vectors.T).float()
        self._set(self.layer.weight @ ((vectors * values.sqrt()) @ vectors.T).float(), self.mean)

    def _set(self, weight: torch.Tensor, mean: torch.Tensor) -> None:
        with torch.no_grad():
            self.layer.bias.add_(self.layer.weight @ mean)
            self.layer.weight.copy_(weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        whitened = (self.projector.select(features) - self.mean) @ self.matrix
        projected: torch.Tensor = self.projector.map(whitened)
        return projected

    def fold(self) -> None:
        """Let the plain projector compute what this did."""
        self._set(self.layer.weight @ self.matrix, -self.matrix @ self.mean)


if __name__ == "__main__":
    main()
