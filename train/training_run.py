"""One projector in training: its flags, its folder, its optimizer and how far it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from llava_core.bootstrap import with_interval
from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.language.conversation import Example
from llava_core.projector.projector import parameter_count
from llava_core.types import JsonDict
from train.config import RunConfig
from train.data.packing import Packing
from train.data.samples import Schedule, answer_tokens
from train.evaluate import INTERVALS, ONE_PICTURE, evaluate
from train.initialization import initial_projector
from train.metric_writers import Report
from train.optimizer import build_optimizer, learning_rate
from train.plan import predict, projector_of
from train.resources import Shared
from train.run_folder import RunFolder, weights_sha256
from train.sample_captions import beside_its_caption, captions


class Member:
    """A run's own parts and state. Raises LlavaError if its folder holds what it cannot continue."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, shared: Shared, title: str = "", name: str | None = None
    ) -> None:
        self.name = name or config.out.name
        """In reports."""
        self.config, self.folder, self.shared = config, folder, shared
        self.llm, self.world = shared.llm, shared.world
        self.title = title
        """Before its lines in the log, where several runs train together."""
        shared.keep_features(config)
        self.samples, self.held_out = shared.samples(config)
        self.schedule = Schedule.of(config, len(self.samples))
        self.prediction = predict(
            config,
            self.samples,
            self.llm.model,
            self.llm.device,
            shared.resident,
            len(self.held_out) if self.held_out else 0,
            self.kept_rows(),
            self.world.size,
        )
        if folder.begun:  # its checkpoint holds the weights, wherever they came from at first
            self.projector = projector_of(config, shared.shards[0], self.llm.hidden).to(self.llm.device)
        else:
            self.projector = initial_projector(config, self.samples, self.llm)
        self.visual = self.projector.tokens_out(self.samples.tokens)
        """Visual tokens of a sample, as the language model sees them."""
        self.optimizer = build_optimizer(config, self.projector)
        self.step = 0
        self.figures: JsonDict = {}
        self.best = math.inf
        self.before: float | None = None
        """Held-out loss before the first step, if this process has measured it."""
        self.cut = self.dropped = 0
        """Answers cut so far, and turns left out after them."""
        self.rows = shared.rows(config)
        self.init = None if folder.begun else weights_sha256(config.init)
        """sha256 of the weights that it started from, if those of --init."""
        if self.world.main and (state := folder.resume(shared.provenance, self.rows)):
            self.restore(state)
        say(
            f"{title}frozen: {self.llm.id} ({parameter_count(self.llm.model):,} parameters); "
            f"trained: {config.projector} projector {shared.shards[0].width}→{self.llm.hidden} "
            f"({parameter_count(self.projector):,} parameters); "
            f"visual tokens: {config.visual_tokens} ({self.samples.tokens}→{self.visual})"
        )
        if config.init is not None and not self.step:
            say(f"{title}starts from {config.init}")
        say(
            f"{title}{len(self.samples)} samples, features {self.samples.place}; "
            f"{self.schedule.steps} steps of {config.batch_size} on {self.llm.device}"
            + (f" in {self.world.size} processes" if self.world.size > 1 else "")
            + (f", continued at step {self.step}" if self.step else "")
            + f"; {self.schedule.ending}"
        )

    def kept_rows(self) -> int:
        """Rows whose features are kept on the device, once all that are read have been."""
        read = {self.samples: self.schedule.read}
        if self.held_out:
            read[self.held_out] = len(self.held_out)
        device = self.llm.device
        return sum(n for rows, n in read.items() if rows.kept and rows.kept.features.device == device)

    def begin(self) -> None:
        """Open its folder's files; every rank goes on from the main one's state."""
        config, world = self.config, self.world
        if world.size > 1:
            self.follow_main()
        with world.together():
            if world.main:
                self.folder.begin()
            training = self.folder.training
            self.report = Report(config.out, config.report_to, training, self.step, world.main, self.name)
        assert self.shared.prepared is not None
        self.report.log(self.step, self.shared.prepared.figures())

    @property
    def done(self) -> bool:
        return self.step == self.schedule.steps

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and after the last, is to be done now."""
        return self.step % every == 0 or self.done

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.projector.parameters())

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.config, step, self.schedule.steps)

    def update(self) -> None:
        """The optimizer's step, with the gradients that the parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def operations(self, examples: Sequence[Example]) -> int:
        """Needed of a step over these samples."""
        lengths = [self.visual + len(example.ids) for example in examples]
        return self.prediction.work.operations(lengths, self.visual * len(lengths), answer_tokens(examples))

    def evaluate(self, packing: Packing) -> bool:
        """Measure the held-out rows; True if no earlier loss was lower."""
        if not self.held_out:
            return False
        config = self.config
        held_out = self.held_out
        evaluated = evaluate(self.llm, self.projector, held_out, config.batch_size, packing, self.world)
        figures = evaluated.figures
        self.figures = {
            f"eval_{name}{end}": figures[name + end] for name in INTERVALS for end in ("", "_low", "_high")
        }
        self.figures["eval_step"] = self.step
        lines: list[JsonDict] = []
        with self.world.together():
            if config.eval_captions and self.world.main:
                lines = captions(self.llm, self.projector, held_out, config.eval_captions)
            if self.world.main:
                self.folder.keep_held_out(evaluated.sums, held_out.identity)
        self.report.log(self.step, self.figures | ({"eval_captions": lines} if lines else {}))
        gap = f"grounding gap {with_interval(figures, 'grounding_gap')}"
        say(
            f"{self.title}step {self.step}: held-out loss {with_interval(figures, 'loss')}, "
            f"perplexity {with_interval(figures, 'perplexity', 2)}, "
            f"{ONE_PICTURE if figures['grounding_gap'] is None else gap}"
        )
        for line in lines[:2]:
            for text in beside_its_caption(line):
                say(text)
        if not self.step:
            self.before = figures["loss"]
        better: bool = figures["loss"] < self.best
        # Before the first step there is no checkpoint, so none is that good.
        self.best = min(self.best, figures["loss"]) if self.step else math.inf
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
            "init": self.init,
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, with the `projector` in it."""
        self.projector.load_state_dict(state["projector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.figures = state["step"], state["best"], state["figures"]
        self.cut, self.dropped = state["cut"], state["dropped"]
        self.init = state.get("init")  # which earlier versions did not keep
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
                described = (self.shared.provenance, self.figures, self.state())
                self.folder.save(self.step, self.projector, *described, best)

    def finish(self, more: JsonDict) -> JsonDict:
        """Write and return the summary: the figures of the last evaluation, and `more`."""
        summary = {**self.figures, "out": str(self.config.out), "steps": self.step}
        summary |= {"captions_cut": self.cut, "turns_dropped": self.dropped, **more}
        if self.world.main:
            self.folder.finish(summary)
        cut = f"; {self.cut} captions were cut at {self.config.max_text_tokens} tokens" if self.cut else ""
        cut += f", and {self.dropped} turns after them dropped" if self.dropped else ""
        say(f"{self.title}finished {self.step} steps{cut}")
        if self.config.init is not None and self.before is not None and self.before < self.best < math.inf:
            losses = f"held-out loss {self.before:.4f} there, {self.best:.4f} here"
            say(f"{self.title}no step was better than {self.config.init}: {losses}; try a lower --lr")
        return summary

    def diverged(self, loss: float) -> LlavaError:
        """Why it cannot go on after the step it has made, or before the first."""
        if not self.step:
            return LlavaError(
                f"the held-out loss is {loss} before the first step",
                do="look for numbers that are not finite in the features, held-out ones too, or in --init",
            )
        _, indices = self.schedule.at(self.step - 1)
        picked = [self.samples.rows[index] for index in indices]
        rows = [f"{self.samples.shards[shard].path.name}:{row}" for shard, row in picked]
        return LlavaError(
            f"the loss is {loss} at step {self.step}, learning rate {self.learning_rate(self.step - 1):.2e}",
            got=f"rows {', '.join(rows)}",
            do="begin again in another --out with a lower --lr",
        )
