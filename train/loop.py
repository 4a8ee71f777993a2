"""The training loop: next batch, loss, backward, step, log, evaluate, save."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from llava_core.bootstrap import figure_rows
from llava_core.cli.console import human_seconds, progress, say, show, table
from llava_core.cli.translation import translated
from llava_core.device import Later, is_memory_full
from llava_core.errors import LlavaError
from llava_core.types import JsonDict
from train.cost_prediction import outcome_line
from train.data.batch import Batch
from train.data.packing import Packing, cut, tokens_of
from train.data.prefetch import training_batches
from train.distributed import DeferredError
from train.model.blocks import compilations
from train.model.loss import packed_losses
from train.resources import TrainingResources
from train.stop_signal import StopRequest
from train.throughput import Throughput, progress_line
from train.training_run import TrainingRun

Outcome: TypeAlias = "JsonDict | LlavaError"
"""The summary of a run that ended, or the error it failed with."""
EvalCallback = Callable[[int, int, JsonDict], bool]
"""(which run, its step, its figures) after each evaluation; False ends that run there."""
EndCallback = Callable[[TrainingRun], JsonDict]
"""Measures a run after its last step: more figures of its summary."""
Losses = dict[int, float]
"""Each run's mean loss of a step by the run's number, in nats per answer token."""
QUIET_SECONDS = 60.0
"""Least time between two lines of the log that stand for the progress bar where there is none."""


class Trainer:
    """Trains runs that stand at the same step and see the same samples, each with a projector of its own."""

    def __init__(
        self,
        runs: Mapping[int, TrainingRun],
        resources: TrainingResources,
        packing: Packing,
        stop: StopRequest,
        on_eval: EvalCallback | None = None,
        on_end: EndCallback | None = None,
    ) -> None:
        self.runs, self.active = runs, dict(runs)
        """All runs by their numbers, and those of them that have not ended."""
        self.resources, self.packing, self.stop = resources, packing, stop
        self.on_eval, self.on_end = on_eval, on_end
        self.llm, self.group = resources.llm, resources.group
        first = next(iter(runs.values()))
        self.config, self.schedule, self.samples = first.config, first.schedule, first.samples
        self.step = first.step
        self.stopping = False
        """A rank has been asked to stop."""
        self.unread: collections.deque[tuple[int, list[int], Later]] = collections.deque()
        """Losses that the device still computes: the step, the runs' numbers, and one loss each."""
        self.outcomes: dict[int, Outcome] = {}
        self.throughput = Throughput(self.llm.device, first.prediction.matmul_rate)
        self.shown = -math.inf
        """When a line of the log last stood for the progress bar, in seconds."""

    def train(self, until: int) -> dict[int, Outcome]:
        """Train to step `until`, one pass of every run's samples through the language model per step.

        Returns the outcomes of the runs that ended by then, by their numbers.
        """
        bar = progress(self.schedule.steps, "steps", initial=self.step)
        with bar, contextlib.closing(self.batches(until)) as batches:
            if self.step == 0:
                self.evaluate()
            for batch in self.throughput.waiting(batches):
                if self.stopping or not self.active:
                    break
                running, losses = list(self.active), self.train_step(batch)
                self.step += 1
                self.unread.append((self.step, running, Later(losses)))
                read = self.read_losses()
                if self.due(self.config.log_every):
                    self.show_progress(bar, self.log(read))
                if self.due(self.config.eval_every):
                    self.evaluate()
                if self.improved or self.stopping or self.due(self.config.save_every):
                    self.save()
                if self.due(self.config.eval_every):
                    self.prune()
                bar.update()
        self.read_losses(all_of_them=True)
        return self.finish()

    def batches(self, until: int) -> Generator[Batch, None, None]:
        """This rank's batches of the steps from here to `until`, read ahead."""
        steps, pin = range(self.step, until), self.llm.device.type == "cuda"
        return training_batches(self.samples, self.schedule, steps, pin, self.group)

    def train_step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step of every run, on this rank's batch and those of the others.

        Returns each run's mean loss in nats per answer token, fp32 [runs], on the device, for which the host
        has not waited. Raises, on every rank, what one of them met.
        """
        runs, counts = list(self.active.values()), batch.counts
        losses = [torch.zeros((), device=self.llm.device) for _ in runs]
        with DeferredError() as deferred:
            if batch.error is not None:
                raise batch.error
            while not self.backward(batch, losses):
                self.take_fewer_tokens(batch)
        gradients = [gradient for run in runs for gradient in run.gradients()]
        tokens = sum(run.visual * counts.pictures + counts.tokens for run in runs)
        operations = sum(run.operations(counts) for run in runs)
        own = (counts.samples * len(runs), tokens, operations, counts.cut, counts.dropped, bool(self.stop))
        sums = self.group.exchange([*losses, *gradients], counts.answers, own, deferred.error)
        samples, tokens, operations, cut, dropped, stopping = map(int, sums)
        self.stopping = stopping > 0
        for run in runs:
            run.update(cut, dropped)
        self.throughput.count(samples, tokens, operations)
        return torch.stack(losses)

    def read_losses(self, all_of_them: bool = False) -> Losses:
        """End the runs whose loss was not finite; returns the losses of the last step that has been read.

        The newest step's stay unread, so that the device need not wait for the host, unless they are needed.
        """
        config, losses = self.config, Losses()
        needed = self.stopping or any(map(self.due, (config.log_every, config.eval_every, config.save_every)))
        while len(self.unread) > (0 if needed or all_of_them else 1):
            step, numbers, values = self.unread.popleft()
            losses = dict(zip(numbers, values.read().tolist(), strict=True))
            self.end_diverged({number: losses[number] for number in numbers if number in self.active}, step)
        return losses

    @contextlib.contextmanager
    def dropout(self) -> Iterator[None]:
        """Dropout is on in the block; what it leaves out is a function of seed, step and rank."""
        key = f"dropout/{self.config.seed}/{self.step}/{self.group.rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        try:
            self._drop_out(True)
            yield
        finally:
            self._drop_out(False)

    def _drop_out(self, on: bool) -> None:
        for run in self.runs.values():
            run.projector.train(on)
            run.tuning.dropout(on)

    def backward(self, batch: Batch, losses: list[torch.Tensor]) -> bool:
        """Set `losses` to each run's mean loss over the batch's answer tokens, and compute its gradients.

        Returns whether the device's memory was large enough.
        """
        runs = list(self.active.values())
        projectors = [run.projector for run in runs]
        for loss in losses:
            loss.zero_()
        try:
            with self.dropout():
                for row in self.packing.rows(batch.to(self.llm.device), [run.visual for run in runs]):
                    means = [loss / batch.counts.answers for loss in packed_losses(self.llm, projectors, row)]
                    torch.stack(means).sum().backward()  # type: ignore[no-untyped-call]
                    for (k, _), mean in zip(row.packs, means, strict=True):
                        losses[k] += mean.detach()
        except RuntimeError as error:
            if not is_memory_full(error):
                raise
            return False
        return True

    def take_fewer_tokens(self, batch: Batch) -> None:
        """From here on half of what this batch had in a pass, whose gradients are forgotten.

        Raises LlavaError if that was one sample.
        """
        lengths = [tokens_of(each, run.visual) for run in self.active.values() for each in batch.examples]
        laid = self.packing
        cuts = cut(lengths, laid.micro_tokens, room=laid.room)
        most = max(sum(lengths[start:end]) for start, end in cuts)
        fewer = max(*lengths, most // 2)
        if fewer == most:
            raise LlavaError(
                f"the memory of {self.llm.device} is too small for one sample",
                got=f"{most:,} tokens",
                do="give --gradient-checkpointing, a lower --max-text-tokens, or --visual-tokens pool",
            )
        say(f"no room on {self.llm.device} for {most:,} tokens in a pass: now --micro-tokens {fewer}")
        self.packing = dataclasses.replace(laid, room=fewer)
        self.llm.model.zero_grad()  # what was not added to its copy in fp32
        for optimizer in [each for run in self.active.values() for each in run.optimizers]:
            optimizer.zero_grad()
        if self.llm.device.type == "cuda":
            torch.cuda.empty_cache()

    def due(self, every: int) -> bool:
        """Whether what is done every `every` steps, and after the last one, is to be done now."""
        return self.step % every == 0 or self.step == self.schedule.steps

    def log(self, losses: Mapping[int, float]) -> str:
        """Write a line of metrics for every run; returns the last one's, for the progress bar."""
        rates, line = self.throughput.rates(), ""
        rates |= {"compilations": compilations()} if self.resources.compiled else {}
        for number, run in self.active.items():
            metrics = {"loss": losses[number], "lr": run.learning_rate(self.step - 1), **rates}
            run.loss = losses[number]
            run.writers.log(self.step, metrics)
            line = translated(progress_line(metrics))
        return line

    def show_progress(self, bar: tqdm[Any], line: str) -> None:
        """Show the last loss and the rates behind the bar or, where it is hidden, as a line now and then."""
        bar.set_postfix_str(line)
        left = self.schedule.steps - self.step
        if bar.disable and left and self.active and time.monotonic() - self.shown >= QUIET_SECONDS:
            seconds = left * self.throughput.total_seconds / self.throughput.total_steps
            *_, run = self.active.values()
            say(
                f"{run.title}step {self.step:,} of {self.schedule.steps:,}: {line}; "
                f"{human_seconds(seconds)} left, evaluations not counted"
            )
            self.shown = time.monotonic()

    def evaluate(self) -> None:
        """Measure every run on the held-out rows."""
        for run in self.active.values():
            run.evaluate(self.packing)
        losses = {number: run.figures.get("eval_loss", 0.0) for number, run in self.active.items()}
        self.end_diverged(losses, self.step)
        self.throughput.restart()  # rates are those of training alone

    @property
    def improved(self) -> bool:
        """Whether a run's latest evaluation was its best so far, and is not saved yet."""
        return any(run.improved for run in self.active.values())

    def save(self) -> None:
        """Save the runs that improved; when it is time, or before a stop, all of them."""
        every = self.stopping or self.due(self.config.save_every)
        for run in self.active.values():
            if every or run.improved:
                run.save()
        self.throughput.restart()

    def prune(self) -> None:
        """End the runs that `on_eval` has seen enough of."""
        for number, run in list(self.active.items()):
            if not (self.on_eval and run.figures) or self.on_eval(number, self.step, run.figures) or run.done:
                continue
            run.save()
            self.end(number, run.finish({"pruned": self.step}))

    def end_diverged(self, losses: Mapping[int, float], step: int) -> None:
        """End the runs whose loss at `step` is not finite."""
        for number, loss in losses.items():
            if not math.isfinite(loss):
                self.end(number, self.active[number].diverged(loss, step))

    def end(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome
        del self.active[number]

    def finish(self) -> dict[int, Outcome]:
        """End the runs that made all their steps. Raises KeyboardInterrupt, on every rank, after a stop."""
        if self.stopping:
            self.group.fail_all(KeyboardInterrupt())
        for number, run in list(self.active.items()):
            if run.done:
                compared = run.prediction.compared(self.throughput) if len(self.runs) == 1 else {}
                more = self.on_end(run) if self.on_end else {}
                self.end(number, run.finish(compared | more))
                if compared:
                    say(outcome_line(compared))
                if run.figures:
                    show(table(figure_rows(run.figures)))
        return self.outcomes
