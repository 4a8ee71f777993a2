"""`train run`: the loop. Next batch, loss, backward, step, log, evaluate, save."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_core.checkpoint import Provenance
from llava_core.console import progress, say, table
from llava_core.conversation import CONVERSATION_FORMAT, Conversation
from llava_core.device import pick_device
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
    shards = open_shards(config.features)
    held_out = open_shards(config.eval_features) if config.eval_features else []
    require_same_fingerprint([*shards, *held_out])
    projector_of(config, shards[0], hidden=1).tokens_out(shards[0].tokens)  # before the wait for a model
    folder = RunFolder(config.out, config)
    if (finished := folder.finished()) is not None:
        say(f"{config.out} is finished; nothing to do")
        return finished
    with Lock(config.out):
        device = pick_device(config.device)
        resident = peak_memory(device)
        llm = load_language_model(config.llm, device)
        prepare(llm)
        return Trainer(config, folder, llm, shards, held_out, resident).train()


class Trainer:
    """A run's parts and its state: the projector, its optimizer and the number of steps done."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        llm: LanguageModel,
        shards: list[Shard],
        held_out: list[Shard],
        resident: int,
    ) -> None:
        self.config, self.folder, self.llm = config, folder, llm
        conversation = Conversation(llm.tokenizer, llm.eos_ids)
        self.samples = Samples(shards, conversation, config.max_text_tokens, config.max_samples, config.seed)
        self.held_out = held_out and Samples(
            held_out, conversation, config.max_text_tokens, config.eval_samples, seed=0
        )
        self.schedule = Schedule(
            len(self.samples), config.batch_size, config.epochs, config.max_steps, config.seed
        )
        self.prediction = predict(config, self.samples, llm.model, llm.device, resident)
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
        if state := folder.resume(self.provenance, self.rows):
            self.projector.load_state_dict(state["projector"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best, self.figures = state["step"], state["best"], state["figures"]
            self.cut, self.dropped = state["cut"], state["dropped"]
            torch.set_rng_state(state["rng"])
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
            + (f", continued at step {self.step}" if self.step else "")
        )

    def train(self) -> JsonDict:
        config, schedule = self.config, self.schedule
        self.folder.begin()
        report = Report(config.out, config.report_to, self.folder.training, self.step)
        batches = prefetch(self.samples, schedule, self.step, pin=self.llm.device.type == "cuda")
        meter = Meter(self.llm.device, self.prediction.matmul_rate)
        try:
            with stop_request() as stop, progress(schedule.steps, "steps", initial=self.step) as bar:
                if self.step == 0:
                    self.evaluate(report)
                for batch in meter.waiting(batches):
                    loss, tokens = self.train_step(batch)
                    meter.count(len(batch.examples), tokens, self.operations(batch))
                    self.cut += sum(example.cut for example in batch.examples)
                    self.dropped += sum(example.dropped for example in batch.examples)
                    self.require_finite(loss)
                    done = self.step == schedule.steps
                    if self.step % config.log_every == 0 or done:
                        metrics = {"loss": loss, "lr": self.learning_rate(self.step - 1), **meter.rates()}
                        report.log(self.step, metrics)
                        bar.set_postfix_str(progress_line(metrics))
                    bar.update()
                    better = (self.step % config.eval_every == 0 or done) and self.evaluate(report)
                    if self.step % config.save_every == 0 or done or stop or better:
                        self.save(better)
                    if stop:
                        raise KeyboardInterrupt
                    if self.step % config.eval_every == 0 or self.step % config.save_every == 0:
                        meter.restart()  # rates are those of training alone
        finally:
            batches.close()
            report.close()
        summary = {**self.figures, "out": str(config.out), "steps": schedule.steps}
        summary |= {"captions_cut": self.cut, "turns_dropped": self.dropped}
        summary |= (outcome := self.prediction.compared(meter))
        self.folder.finish(summary)
        cut = f"; {self.cut} captions were cut at {config.max_text_tokens} tokens" if self.cut else ""
        cut += f", and {self.dropped} turns after them dropped" if self.dropped else ""
        say(f"finished {schedule.steps} steps{cut}")
        if outcome:
            say(outcome_line(outcome))
        print(table([(k.replace("_", " "), f"{v:.4f}") for k, v in self.figures.items() if v is not None]))
        return summary

    def train_step(self, batch: Batch) -> tuple[float, int]:
        """One optimizer step; returns the mean loss per answer token and the tokens the model saw."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        answers = sum(sum(label >= 0 for label in example.labels) for example in batch.examples)
        total, tokens = torch.zeros((), device=self.llm.device), 0
        for pack in packs(batch, self.visual, self.config.micro_tokens):
            loss = summed_loss(self.llm, self.projector, pack.to(self.llm.device)) / answers
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            tokens += len(pack.ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(total), tokens

    def operations(self, batch: Batch) -> int:
        """Needed operations of a step over this batch."""
        lengths = [self.visual + len(example.ids) for example in batch.examples]
        answers = sum(sum(label >= 0 for label in example.labels) for example in batch.examples)
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
        figures = evaluate(self.llm, self.projector, self.held_out, config.batch_size, config.micro_tokens)
        self.figures = {f"eval_{name}": figures[name] for name in ("loss", "perplexity", "grounding_gap")}
        self.figures["eval_step"] = self.step
        lines: list[JsonDict] = []
        if config.eval_captions:
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

    def save(self, best: bool) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "figures": self.figures,
            "cut": self.cut,
            "dropped": self.dropped,
            "rows": self.rows,
            "rng": torch.get_rng_state(),
        }
        self.folder.save(self.step, self.projector, self.provenance, self.figures, state, best)

    def require_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        _, indices = self.schedule.at(self.step - 1)
        picked = [self.samples.rows[index] for index in indices]
        rows = [f"{self.samples.shards[shard].path.name}:{row}" for shard, row in picked]
        raise LlavaError(
            f"the loss is {loss} at step {self.step}, learning rate {self.learning_rate(self.step - 1):.2e}",
            got=f"rows {', '.join(rows)}",
            do="begin again in another --out with a lower --lr",
        )

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
        place = pick_residence(self.config.resident, needed, self.llm.device)
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
            signal.signal(signum, handler)
