"""`train run`: the loop. Next batch, loss, backward, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from llava_core.checkpoint import Provenance
from llava_core.console import progress, say, table
from llava_core.conversation import CONVERSATION_FORMAT, Conversation, Example
from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict
from llava_core.language import LanguageModel, load_language_model
from llava_core.lock import Lock
from llava_core.projector import Projector, match_scale, parameter_count
from llava_core.shards import Shard, open_shards, require_same_fingerprint
from train.captions import captions
from train.config import RunConfig
from train.evaluate import evaluate
from train.loader import prefetch
from train.meter import Meter, peak_memory, progress_line
from train.objective import prepare, summed_loss
from train.packing import packs
from train.parallel import World, joined
from train.plan import outcome_line, predict, projector_of
from train.plan import run as plan
from train.report import Report
from train.resident import pick_residence
from train.runfolder import RunFolder
from train.samples import Batch, Samples, Schedule

SCALE_SAMPLES = 64
"""Samples whose features set the scale of the initial projector."""


def run(config: RunConfig) -> JsonDict:
    """Train a projector, or continue the run that OUT holds; returns the figures of the last checkpoint."""
    if config.dry_run:
        return plan(config)
    with joined() as world, ExitStack() as stack:
        with world.together():
            shards = open_shards(config.features)
            held_out = open_shards(config.eval_features) if config.eval_features else []
            require_same_fingerprint([*shards, *held_out])
            projector_of(config, shards[0], hidden=1).tokens_out(shards[0].tokens)  # before a model is loaded
            folder = RunFolder(config.out, config)
            if (finished := folder.finished()) is not None:
                say(f"{config.out} is finished; nothing to do")
                return finished
            if world.main:
                stack.enter_context(Lock(config.out))
            device = world.device(config.device)
            resident = peak_memory(device)
            llm = load_language_model(config.llm, device)
            prepare(llm)
            trainer = Trainer(config, folder, llm, shards, held_out, world, resident)
        return trainer.train()


@dataclasses.dataclass(frozen=True)
class Step:
    """What all ranks did in one step."""

    loss: float
    """Mean over its answer tokens."""
    samples: int
    tokens: int
    """What the language model saw, visual tokens included."""
    operations: int
    """That were needed (train.flops)."""
    stopping: bool
    """A rank has been asked to stop."""


class Trainer:
    """A run's parts and its state: the projector, its optimizer and the number of steps done."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        llm: LanguageModel,
        shards: list[Shard],
        held_out: list[Shard],
        world: World,
        resident: int,
    ) -> None:
        self.config, self.folder, self.llm, self.world = config, folder, llm, world
        conversation = Conversation(llm.tokenizer, llm.eos_ids)
        self.samples = Samples(shards, conversation, config.max_text_tokens, config.max_samples, config.seed)
        self.held_out = held_out and Samples(
            held_out, conversation, config.max_text_tokens, config.eval_samples, seed=0
        )
        self.schedule = Schedule(
            len(self.samples), config.batch_size, config.epochs, config.max_steps, config.seed
        )
        evaluated = len(self.held_out) if self.held_out else 0
        self.prediction = predict(
            config, self.samples, llm.model, llm.device, resident, evaluated, world.size
        )
        self.provenance = Provenance(
            fingerprint=shards[0].fingerprint,
            encoder=shards[0].encoder,
            preprocess=shards[0].preprocess,
            language_model=llm.identity,
            conversation=CONVERSATION_FORMAT,
        )
        self.projector = self._initial_projector(shards[0]).to(llm.device)
        self.visual = self.projector.tokens_out(self.samples.tokens)
        self.optimizer = torch.optim.AdamW(
            self.projector.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.step = 0
        self.figures: JsonDict = {}
        self.best = math.inf
        self.cut = self.dropped = 0
        """Answers cut so far, and turns left out after them."""
        self.rows = {"samples": self.samples.identity}
        if self.held_out:
            self.rows["held_out"] = self.held_out.identity
        if world.main and (state := folder.resume(self.provenance, self.rows)):
            self.restore(state)
        self._keep_features()
        say(
            f"frozen: {llm.identity['id']} ({parameter_count(llm.model):,} parameters); trained: "
            f"{config.projector} projector {shards[0].width}→{llm.hidden} "
            f"({parameter_count(self.projector):,} parameters); "
            f"visual tokens: {config.visual_tokens} ({self.samples.tokens}→{self.visual})"
        )
        say(
            f"{len(self.samples)} samples, features {self.samples.place}; "
            f"{self.schedule.steps} steps of {config.batch_size} on {llm.device}"
            + (f" in {world.size} processes" if world.size > 1 else "")
            + (f", continued at step {self.step}" if self.step else "")
        )

    def train(self) -> JsonDict:
        config, schedule, world = self.config, self.schedule, self.world
        if world.size > 1:
            self.follow_main()
        with world.together():
            if world.main:
                self.folder.begin()
            report = Report(config.out, config.report_to, self.folder.training, self.step, world.main)
        ahead = prefetch(self.samples, schedule, self.step, self.llm.device.type == "cuda", world)
        meter = Meter(self.llm.device, self.prediction.matmul_rate)
        batches = meter.waiting(ahead)
        try:
            with stop_request() as stop, progress(schedule.steps, "steps", initial=self.step) as bar:
                if self.step == 0:
                    self.evaluate(report)
                    self.best = math.inf  # no checkpoint is that good: there is none yet
                while self.step < schedule.steps:
                    step = self.train_step(batches, stop)
                    meter.count(step.samples, step.tokens, step.operations)
                    self.require_finite(step.loss)
                    done = self.step == schedule.steps
                    if self.step % config.log_every == 0 or done:
                        lr = self.learning_rate(self.step - 1)
                        metrics = {"loss": step.loss, "lr": lr, **meter.rates()}
                        report.log(self.step, metrics)
                        bar.set_postfix_str(progress_line(metrics))
                    bar.update()
                    better = (self.step % config.eval_every == 0 or done) and self.evaluate(report)
                    if self.step % config.save_every == 0 or done or step.stopping or better:
                        self.save(better)
                    if step.stopping:
                        world.end(KeyboardInterrupt())
                    if self.step % config.eval_every == 0 or self.step % config.save_every == 0:
                        meter.restart()  # rates are those of training alone
        finally:
            ahead.close()
            report.close()
        summary = {**self.figures, "out": str(config.out), "steps": schedule.steps}
        summary |= {"captions_cut": self.cut, "turns_dropped": self.dropped}
        summary |= (outcome := self.prediction.compared(meter))
        if world.main:
            self.folder.finish(summary)
        cut = f"; {self.cut} captions were cut at {config.max_text_tokens} tokens" if self.cut else ""
        cut += f", and {self.dropped} turns after them dropped" if self.dropped else ""
        say(f"finished {schedule.steps} steps{cut}")
        if outcome:
            say(outcome_line(outcome))
        print(table([(k.replace("_", " "), f"{v:.4f}") for k, v in self.figures.items() if v is not None]))
        return summary

    def train_step(self, batches: Iterator[Batch], stop: list[int]) -> Step:
        """One optimizer step, on this rank's next batch and on those of the other ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        total, answers = torch.zeros((), device=self.llm.device), 0
        examples: list[Example] = []
        error = None
        try:
            batch = next(batches)
            examples = batch.examples
            answers = sum(sum(label >= 0 for label in example.labels) for example in examples)
            for pack in packs(batch, self.visual, self.config.micro_tokens):
                loss = summed_loss(self.llm, self.projector, pack.to(self.llm.device)) / answers
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except (LlavaError, OSError) as caught:
            error = caught  # for the others to learn, too
        means = [total]
        for parameter in self.projector.parameters():
            if parameter.grad is None:  # no sample here in this step
                parameter.grad = torch.zeros_like(parameter)
            means.append(parameter.grad)
        tokens = sum(self.visual + len(example.ids) for example in examples)
        cut, dropped = sum(e.cut for e in examples), sum(e.dropped for e in examples)
        counts = (len(examples), tokens, self.operations(examples), cut, dropped)
        sums = self.world.exchange(means, answers, (*counts, bool(stop), error is not None))
        samples, tokens, operations, cut, dropped, stopping, failed = map(int, sums)
        if failed:
            self.world.end(error)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.cut += cut
        self.dropped += dropped
        return Step(float(total), samples, tokens, operations, bool(stopping))

    def operations(self, examples: Sequence[Example]) -> int:
        """Needed of a step over these samples."""
        lengths = [self.visual + len(example.ids) for example in examples]
        answers = sum(sum(label >= 0 for label in example.labels) for example in examples)
        return self.prediction.work.operations(lengths, self.visual * len(lengths), answers)

    def learning_rate(self, step: int) -> float:
        """Rate of the step with this number, from 0: linear warm-up, then a cosine to 0."""
        warmup = round(self.config.warmup * self.schedule.steps)
        if step < warmup:
            return self.config.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.schedule.steps - warmup)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * share))

    def evaluate(self, report: Report) -> bool:
        """Measure the held-out rows; True if no earlier loss was lower."""
        if not self.held_out:
            return False
        config = self.config
        figures = evaluate(
            self.llm, self.projector, self.held_out, config.batch_size, config.micro_tokens, self.world
        )
        self.figures = {f"eval_{name}": figures[name] for name in ("loss", "perplexity", "grounding_gap")}
        self.figures["eval_step"] = self.step
        lines: list[JsonDict] = []
        with self.world.together():
            if config.eval_captions and self.world.main:
                lines = captions(self.llm, self.projector, self.held_out, config.eval_captions)
        report.log(self.step, self.figures | ({"eval_captions": lines} if lines else {}))
        say(
            f"step {self.step}: held-out loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}"
            + (f", grounding gap {gap:.4f}" if (gap := figures["grounding_gap"]) is not None else "")
        )
        for line in lines[:2]:
            say(f"  {line['row']}: {line['generated']}")
        better: bool = figures["loss"] < self.best
        self.best = min(self.best, figures["loss"])
        return better

    def state(self) -> dict[str, Any]:
        """What a run continues from, beside the projector's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "figures": self.figures,
            "cut": self.cut,
            "dropped": self.dropped,
            "rows": self.rows,
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with the `projector` in it."""
        self.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.figures = state["step"], state["best"], state["figures"]
        self.cut, self.dropped = state["cut"], state["dropped"]
        torch.set_rng_state(state["rng"])

    def follow_main(self) -> None:
        """Go on from the main rank's state: it alone reads checkpoints, and no weight may differ by a bit."""
        state = self.world.from_main({**self.state(), "projector": self.projector.state_dict()})
        with self.world.together():
            if state["rows"] != self.rows:
                raise LlavaError("the processes see different shards", do="give all of them the same files")
            self.restore(state)

    def save(self, best: bool) -> None:
        with self.world.together():
            if self.world.main:
                described = (self.provenance, self.figures, self.state())
                self.folder.save(self.step, self.projector, *described, best)

    def require_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        _, indices = self.schedule.at(self.step - 1)
        picked = [self.samples.rows[index] for index in indices]
        rows = [f"{self.samples.shards[shard].path.name}:{row}" for shard, row in picked]
        error = LlavaError(
            f"the loss is {loss} at step {self.step}, learning rate {self.learning_rate(self.step - 1):.2e}",
            got=f"rows {', '.join(rows)}",
            do="begin again in another --out with a lower --lr",
        )
        self.world.end(error)

    def _initial_projector(self, shard: Shard) -> Projector:
        torch.manual_seed(self.config.seed)
        projector = projector_of(self.config, shard, self.llm.hidden)
        some = self.samples.read(range(min(SCALE_SAMPLES, len(self.samples))))
        match_scale(projector, some.float(), self.llm.embedding_rms)
        return projector

    def _keep_features(self) -> None:
        """Keep features where --resident says; auto has no use for what is read only once."""
        repeated = self.schedule.steps > self.schedule.steps_per_epoch
        kept = [self.samples] if repeated or self.config.resident != "auto" else []
        if self.held_out:
            kept.append(self.held_out)
        needed = sum(samples.feature_bytes for samples in kept)
        place = pick_residence(self.config.resident, needed, self.llm.device, self.world.size)
        if place:
            for samples in kept:
                samples.keep(place)


@contextmanager
def stop_request() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of raising, so that a step is never torn; a second one raises."""
    received: list[int] = []

    def receive(signum: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        say("stopping after this step, or its evaluation; once more stops at once")

    previous = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            if signal.getsignal(signum) is receive:  # or World.end has seen to it
                signal.signal(signum, handler)
