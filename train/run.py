"""`train run`: the loop. Next batch, loss, backward, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from llava_core.bootstrap import figure_rows
from llava_core.cli.command import stop_signals
from llava_core.cli.console import progress, say, show, table
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.language.conversation import Example
from llava_core.types import JsonDict
from train.config import RunConfig
from train.data.packing import Packing
from train.data.prefetch import prefetch
from train.data.samples import Batch, answer_tokens
from train.distributed import joined
from train.model.loss import summed_losses
from train.model.packed_model import compilations
from train.plan import outcome_line, projector_of
from train.plan import run as plan
from train.resources import Shared
from train.run_folder import RunFolder
from train.throughput import Meter, progress_line
from train.training_run import Member

SHAPES = 24
"""Rows are padded to whole parts of a usual step, so many in all, if the model is compiled for each shape."""

Watch = Callable[[int, int, JsonDict], bool]
"""(which run, its step, its figures) after each evaluation; False ends that run there."""


def run(config: RunConfig) -> JsonDict:
    """Train a projector, or continue the run that OUT holds; returns the figures of the last checkpoint."""
    if config.dry_run:
        return plan(config)
    with joined() as world:
        with world.together():
            shared = Shared(config, world)
        (outcome,) = train([config], shared)
        if isinstance(outcome, LlavaError):
            world.end(outcome)
        return outcome


def train(
    configs: Sequence[RunConfig], shared: Shared, watch: Watch | None = None, names: Sequence[str] = ()
) -> list[JsonDict | LlavaError]:
    """Train these runs together: each step is one pass of all their samples through the language model.

    They have the same samples in the same order, so they may differ in what concerns the projector alone
    (MEMBER_KEYS). Each has a folder of its own and continues from there. Returns each run's summary, with
    `pruned` where `watch` ended it, or the error it failed with while the others went on. `names` are what
    reports call the runs, by default their folders'.
    """
    world = shared.world
    outcomes: list[JsonDict | LlavaError | None] = [None] * len(configs)
    members: dict[int, Member] = {}
    with ExitStack() as stack:
        for index, config in enumerate(configs):
            try:
                with world.together():
                    require_same_steps(configs[0], config)
                    projector_of(config, shared.shards[0], shared.llm.hidden).tokens_out(
                        shared.shards[0].tokens
                    )
                    folder = RunFolder(config.out, config)
                    if (finished := folder.finished()) is not None:
                        if folder.moved:
                            folder.resume(shared.provenance, shared.rows(config))  # or refuse
                        say(f"{config.out} is finished; nothing to do")
                        outcomes[index] = finished
                        continue
                    if world.main:
                        stack.enter_context(Lock(config.out))
                    title = f"{config.out.name}: " if len(configs) > 1 else ""
                    members[index] = Member(config, folder, shared, title, names[index] if names else None)
            except LlavaError as error:
                outcomes[index] = error
        if members:
            for index, outcome in Trainer(members, shared, watch).train().items():
                outcomes[index] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


@dataclasses.dataclass(frozen=True)
class Step:
    """What all ranks did in one step."""

    losses: list[float]
    """Of each member: mean over the answer tokens."""
    samples: int
    tokens: int
    """What the language model saw, visual tokens included."""
    operations: int
    """That were needed (train.flops)."""
    stopping: bool
    """A rank has been asked to stop."""


class Trainer:
    """Drives the members through their common steps; one that was behind when it was killed catches up."""

    def __init__(self, members: dict[int, Member], shared: Shared, watch: Watch | None = None) -> None:
        self.members, self.shared, self.watch = members, shared, watch
        self.llm, self.world = shared.llm, shared.world
        self.going = dict(members)
        self.outcomes: dict[int, JsonDict | LlavaError] = {}
        one = next(iter(members.values()))
        self.config, self.samples, self.schedule = one.config, one.samples, one.schedule
        tokens = sum(member.prediction.tokens_per_step for member in members.values())
        unit = max(1, round(tokens / SHAPES)) if shared.compiled else 1
        if shared.compiled and unit != shared.unit:  # what is compiled is for rows of other lengths
            torch._dynamo.reset()
            shared.unit = unit
        self.packing = Packing(self.config.micro_tokens, unit)
        self.meter = Meter(self.llm.device, one.prediction.matmul_rate)

    def train(self) -> dict[int, JsonDict | LlavaError]:
        """To the end of each; returns summaries and errors by the members' keys."""
        for member in self.members.values():
            member.begin()
        start = read = min(member.step for member in self.members.values())
        ahead = self.prefetch(start)
        batches = self.meter.waiting(ahead)
        try:
            with stop_request() as stop, progress(self.schedule.steps, "steps", initial=start) as bar:
                for key, member in self.members.items():
                    if member.step == 0:
                        member.evaluate(self.packing)
                        if not math.isfinite(before := member.figures.get("eval_loss", 0.0)):
                            self.end(key, member.diverged(before))
                self.meter.restart()
                while self.going:
                    now = min(member.step for member in self.going.values())
                    if now == self.schedule.steps:  # killed after its last step, before its summary
                        self.finish()
                        break
                    if now != read:  # who was behind has ended, and the others are further
                        ahead.close()
                        ahead, read = self.prefetch(now), now
                        batches = self.meter.waiting(ahead)
                    active = {key: m for key, m in self.going.items() if m.step == now}
                    step = self.train_step(list(active.values()), batches, stop)
                    read += 1
                    self.meter.count(step.samples, step.tokens, step.operations)
                    due = next(iter(active.values())).due  # what is done when is the same for all
                    rates = self.meter.rates() if due(self.config.log_every) else {}
                    for (key, member), loss in zip(active.items(), step.losses, strict=True):
                        if rates and math.isfinite(loss):
                            bar.set_postfix_str(progress_line(self.log(member, loss, rates)))
                        self.tend(key, member, loss, step.stopping)
                    bar.update()
                    if step.stopping:
                        self.world.end(KeyboardInterrupt())
                    if due(self.config.eval_every) or due(self.config.save_every):
                        self.meter.restart()  # rates are those of training alone
                    if now + 1 == self.schedule.steps:
                        self.finish()
        finally:
            ahead.close()
            for member in self.members.values():
                member.report.close()
        return self.outcomes

    def prefetch(self, step: int) -> Generator[Batch, None, None]:
        """This rank's batches from that step on."""
        return prefetch(self.samples, self.schedule, step, self.llm.device.type == "cuda", self.world)

    def train_step(self, members: list[Member], batches: Iterator[Batch], stop: list[int]) -> Step:
        """One optimizer step of each, on this rank's next batch and on those of the other ranks."""
        device = self.llm.device
        totals = [torch.zeros((), device=device) for _ in members]
        examples: list[Example] = []
        answers, error = 0, None
        try:
            batch = next(batches)
            examples, answers = batch.examples, answer_tokens(batch.examples)
            visual = [member.visual for member in members]
            projectors = [member.projector for member in members]
            for row in self.packing.rows(batch.to(device), visual):
                losses = [loss / answers for loss in summed_losses(self.llm, projectors, row)]
                torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
                for (k, _), loss in zip(row.packs, losses, strict=True):
                    totals[k] += loss.detach()
        except (LlavaError, OSError) as caught:
            error = caught  # for the others to learn, too
        means = list(totals)
        for member in members:
            for parameter in member.parameters():
                if parameter.grad is None:  # no sample here in this step
                    parameter.grad = torch.zeros_like(parameter)
                means.append(parameter.grad)
        words = sum(len(example.ids) for example in examples)
        tokens = sum(member.visual * len(examples) + words for member in members)
        operations = sum(member.operations(examples) for member in members)
        cut, dropped = sum(e.cut for e in examples), sum(e.dropped for e in examples)
        counts = (len(examples) * len(members), tokens, operations, cut, dropped)
        sums = self.world.exchange(means, answers, (*counts, bool(stop), error is not None))
        samples, tokens, operations, cut, dropped, stopping, failed = map(int, sums)
        if failed:
            self.world.end(error)
        for member in members:
            member.update()
            member.cut += cut
            member.dropped += dropped
        return Step([float(total) for total in totals], samples, tokens, operations, bool(stopping))

    def log(self, member: Member, loss: float, rates: JsonDict) -> JsonDict:
        metrics = {"loss": loss, "lr": member.learning_rate(member.step - 1), **rates}
        metrics |= {"compilations": compilations()} if self.shared.compiled else {}
        member.report.log(member.step, metrics)
        return metrics

    def tend(self, key: int, member: Member, loss: float, stopping: bool) -> None:
        """After a member's step: evaluate and save when it is time, and end it if there is no use in it."""
        if not math.isfinite(loss):
            return self.end(key, member.diverged(loss))
        measured = member.due(self.config.eval_every)
        better = measured and member.evaluate(self.packing)
        held_out = member.figures.get("eval_loss", 0.0)
        if not math.isfinite(held_out):
            return self.end(key, member.diverged(held_out))
        if saved := better or stopping or member.due(self.config.save_every):
            member.save(better)
        if measured and member.figures and self.watch:
            wanted = self.watch(key, member.step, member.figures)
            if not wanted and not member.done:
                if not saved:
                    member.save(best=False)
                self.end(key, member.finish({"pruned": member.step}))
        return None

    def end(self, key: int, outcome: JsonDict | LlavaError) -> None:
        self.outcomes[key] = outcome
        del self.going[key]

    def finish(self) -> None:
        """End the members that made all steps."""
        for key, member in list(self.going.items()):
            if member.done:
                outcome = member.prediction.compared(self.meter) if len(self.members) == 1 else {}
                self.end(key, member.finish(outcome))
                if outcome:
                    say(outcome_line(outcome))
                if member.figures:
                    show(table(figure_rows(member.figures)))


def require_same_steps(first: RunConfig, other: RunConfig) -> None:
    """Raise LlavaError unless two runs see the same samples in the same steps."""
    for field in dataclasses.fields(first):
        mine, others = getattr(first, field.name), getattr(other, field.name)
        if field.name not in MEMBER_KEYS and mine != others:
            raise LlavaError(
                f"runs that train together need one --{field.name.replace('_', '-')}",
                expected=mine,
                got=others,
            )


MEMBER_KEYS = frozenset(
    (
        *("out", "projector", "visual_tokens", "start", "optimizer", "lr", "weight_decay", "warmup"),
        *("decay", "init", "keep", "eval_captions", "json"),
    )
)
"""Flags in which runs that train together may differ."""


@contextmanager
def stop_request() -> Iterator[list[int]]:
    """Collects signals to stop instead of raising, so that a step is never torn; a second one raises."""
    received: list[int] = []

    def receive(signum: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        say("stopping after this step, or its evaluation; once more stops at once")

    previous = {s: signal.signal(s, receive) for s in stop_signals()}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            if signal.getsignal(signum) is receive:  # or World.end has seen to it
                signal.signal(signum, handler)
