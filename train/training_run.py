"""One projector in training: its flags, its folder, its optimizer and how far it is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from llava_core.bootstrap import with_interval
from llava_core.cli.console import say
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError
from llava_core.projector.fusion import layer_weights
from llava_core.projector.projector import described
from llava_core.types import JsonDict
from train.announcement import announce
from train.config import RunConfig
from train.cost_prediction import COSTLESS, Prediction, predict
from train.data.batch import TextCounts
from train.data.packing import Packing
from train.data.schedule import Schedule
from train.evaluate import INTERVALS, ONE_PICTURE, evaluate, visual_rms
from train.initialization import initial_projector, projector_of
from train.metric_writers import MetricWriters, logged
from train.optimizer import build_optimizers, learning_rate, load_optimizer
from train.resources import TrainingResources
from train.run_folder import RunFolder, weights_sha256
from train.sample_captions import beside_its_caption, captions
from train.verdict import ANSWERS, NO_VERDICT, data_figures, verdict_of


class TrainingRun:
    """One run: its projector, optimizer, samples and figures; it goes on from what its folder holds.

    `title` stands before its lines in the log, where several runs train together; `name` is what metric
    writers call it, by default its folder's name. Raises LlavaError for a folder that it cannot continue.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        resources: TrainingResources,
        title: str = "",
        name: str | None = None,
    ) -> None:
        self.config, self.folder, self.resources, self.title = config, folder, resources, title
        self.tuning = resources.tune(config)
        self.llm, self.group = resources.llm, resources.group
        resources.cache_features(config)
        self.samples, self.held_out = resources.samples(config)
        question = self.samples.default_question()
        self.provenance = dataclasses.replace(resources.provenance, question=question)
        self.schedule = Schedule.of(config, self.samples.sizes)
        self.prediction = self.predicted()
        if folder.begun:  # its checkpoint holds the weights, wherever they came from at first
            self.projector = projector_of(config, resources.shards[0], self.llm.hidden).to(self.llm.device)
        else:
            self.projector = initial_projector(config, self.samples, self.llm)
            self.tuning.begin(config.init)
        self.projector.eval()  # but in training steps
        self.visual = self.projector.tokens_out(self.samples.tokens)
        """Visual tokens of a sample, as the language model sees them."""
        self.parameters = [*self.projector.parameters(), *self.tuning.parameters]
        """All that trains."""
        self.optimizers = build_optimizers(config, self.projector, self.tuning.parameters)
        self.step = self.saved_step = 0
        self.loss: float | None = None
        """Training loss of the last step that was logged."""
        self.figures: JsonDict = {}
        """Held-out figures of the last evaluation."""
        self.best = math.inf
        """Lowest held-out loss since the first step."""
        self.improved = False
        """Whether the last evaluation was the best, and is not saved yet."""
        self.loss_before: float | None = None
        """Held-out loss before the first step, if this process has measured it."""
        self.cut = self.dropped = 0
        """Answers cut so far, and turns left out after them."""
        self.rows = resources.rows(config)
        self.init = None if folder.begun else weights_sha256(config.init)
        """sha256 of the weights of --init that it started from."""
        self.writers = MetricWriters(config.out, config.report_to, folder.training, name or config.out.name)
        if self.group.main and (state := folder.resume(resources.provenance, self.rows)):
            if state["config"] != self.projector.config:
                raise LlavaError(
                    f"the run in {config.out} began with other registered arguments",
                    expected=described(state["config"]),
                    got=described(self.projector.config),
                    do="register the class as it was then, or choose another --out",
                )
            self.tuning.load(folder.last)
            self.restore(state)
        announce(self)

    def predicted(self) -> Prediction:
        """What it will take; predicted once for all runs of a kind."""
        known, before = self.resources.predictions, self.resources.memory_before
        kind = tuple(value for key, value in vars(self.config).items() if key not in COSTLESS)
        if kind not in known:
            held_out, given = len(self.held_out or ()), (self.samples, self.llm.model, self.llm.device)
            known[kind] = predict(self.config, *given, before, held_out, self.cached_rows(), self.group.size)
        return known[kind]

    def cached_rows(self) -> int:
        """Rows whose features stay on the device once they have been read."""
        read = {self.samples: round(self.schedule.read * self.samples.share_with_picture)}
        if self.held_out:
            read[self.held_out] = len(self.held_out.with_picture)
        device = self.llm.device
        return sum(n for rows, n in read.items() if rows.cache and rows.cache.features.device == device)

    def begin(self) -> None:
        """Open its folder's files; every rank goes on from the main one's state."""
        if self.group.size > 1:
            self.follow_main()
        looked: JsonDict = {}
        with self.group.same_outcome():
            if self.group.main:
                self.folder.begin()
                self.writers.open(self.step)
                looked = {} if self.step else data_figures(self.samples)
        assert self.resources.prepared is not None
        self.writers.log(self.step, self.resources.prepared.figures() | looked)

    @property
    def layer_weights(self) -> JsonDict:
        """Figures of --fuse layers."""
        return layer_weights(self.projector.mix, self.provenance.encoder)

    @property
    def done(self) -> bool:
        return self.step == self.schedule.steps

    def gradients(self) -> list[torch.Tensor]:
        """The gradient of each parameter; zeros if this rank has no sample in this step."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def learning_rate(self, step: int, peak: float | None = None) -> float:
        return learning_rate(self.config, step, self.schedule.steps, peak)

    def update(self, cut: int, dropped: int) -> None:
        """The optimizer's step, with the gradients that the parameters hold; counts the cut answers in it."""
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step, group["peak"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tuning.after_step()
        self.step += 1
        self.cut += cut
        self.dropped += dropped

    def operations(self, counts: TextCounts) -> int:
        """Operations needed for a step over samples with these texts."""
        return self.prediction.work.operations(counts, self.visual)

    def evaluate(self, packing: Packing) -> None:
        """Measure, log and print the held-out figures, if there are held-out rows."""
        if not self.held_out:
            return
        config, held_out = self.config, self.held_out
        evaluated = evaluate(self.llm, self.projector, held_out, config.batch_size, packing, self.group)
        figures = evaluated.figures
        self.figures = {
            f"eval_{name}{end}": figures[name + end]
            for name in (*INTERVALS, *evaluated.parts)
            for end in ("", "_low", "_high")
        }
        self.figures["eval_step"] = self.step
        lines: list[JsonDict] = []
        with self.group.same_outcome():
            self.figures["eval_visual_rms"] = visual_rms(self.llm, self.projector, held_out)
            if config.eval_captions and self.group.main and math.isfinite(figures["loss"]):
                count = max(config.eval_captions, ANSWERS if self.done else 0)
                lines = captions(self.llm, self.projector, held_out, count)
            if self.group.main:
                self.folder.keep_held_out(
                    evaluated.sums, held_out.identity_with_picture, held_out.pictures_identity
                )
        self.writers.log(
            self.step, self.figures | self.layer_weights | ({"eval_captions": lines} if lines else {})
        )
        gap = f"grounding gap {with_interval(figures, 'grounding_gap')}"
        say(
            f"{self.title}step {self.step}: held-out loss {with_interval(figures, 'loss')}, "
            f"perplexity {with_interval(figures, 'perplexity', 2)}, "
            f"{ONE_PICTURE if figures['grounding_gap'] is None else gap}"
        )
        if evaluated.parts:
            parts = (f"{name.removeprefix('loss_').removeprefix('loss/')} {with_interval(figures, name)}"
                     for name in evaluated.parts)  # fmt: skip
            say(f"{self.title}held-out loss of {'; '.join(parts)}")
        for line in lines[:2]:
            for text in beside_its_caption(line):
                say(text)
        if not self.step:  # there is no checkpoint yet, so none is that good
            self.loss_before = figures["loss"]
        elif figures["loss"] < self.best:
            self.best, self.improved = figures["loss"], True

    def state(self) -> dict[str, Any]:
        """All that a run continues from, but for the weights that a checkpoint has in files of their own."""
        return {
            "optimizer": self.optimizers[0].state_dict(),
            "other_optimizers": [optimizer.state_dict() for optimizer in self.optimizers[1:]],
            "copies": self.tuning.state(),
            "step": self.step,
            "best": self.best,
            "figures": self.figures,
            "cut": self.cut,
            "dropped": self.dropped,
            "rows": self.rows,
            "init": self.init,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which has the `projector`'s weights, too."""
        self.projector.load_state_dict(state["projector"])
        optimizers = [state["optimizer"], *state.get("other_optimizers", ())]  # earlier versions had one
        for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
            load_optimizer(optimizer, saved)
        self.tuning.restore(state.get("copies", ()))
        self.step = self.saved_step = state["step"]
        self.best, self.figures = state["best"], state["figures"]
        self.cut, self.dropped = state["cut"], state["dropped"]
        self.init = state.get("init")  # which earlier versions did not keep

    def follow_main(self) -> None:
        """Go on from the main rank's state: it alone reads checkpoints, and no weight may differ by a bit."""
        weights = {"projector": self.projector.state_dict(), "tuned": self.tuning.all_tensors()}
        state = self.group.from_main({**self.state(), **weights})
        with self.group.same_outcome():
            if state["rows"] != self.rows:
                raise LlavaError("the processes see different shards", do="give all of them the same files")
            self.tuning.take(state["tuned"])
            self.restore(state)

    def save(self) -> None:
        """Write a checkpoint, `best` if it is, unless that of this step is written."""
        if self.saved_step == self.step:
            return
        with self.group.same_outcome():
            if self.group.main:
                described = (self.provenance, self.figures | self.layer_weights, self.state())
                self.folder.save(self.step, self.projector, *described, self.improved, self.tuning.weights)
        self.saved_step, self.improved = self.step, False

    def finish(self, more: JsonDict) -> JsonDict:
        """Write and return the summary: the figures of the last evaluation, and `more`."""
        summary = {**self.figures, "out": str(self.config.out), "steps": self.step}
        summary |= {"captions_cut": self.cut, "turns_dropped": self.dropped, **self.layer_weights, **more}
        metrics = logged(self.folder.path / "metrics.jsonl") if self.group.main else []
        verdict = verdict_of(metrics, continued=self.config.init is not None)
        if verdict is not None:
            summary |= verdict.to_json()
        if self.group.main:
            self.folder.finish(summary)
        cut = f"; {self.cut} captions were cut at {self.config.max_text_tokens} tokens" if self.cut else ""
        cut += f", and {self.dropped} turns after them dropped" if self.dropped else ""
        loss = "" if self.loss is None else f"; loss {self.loss:.4f} at the last"
        say(f"{self.title}finished {self.step} steps{loss}{cut}")
        if weights := self.layer_weights:
            listed = (
                f"{name.removeprefix('layer_weight/')} {weight:.3f}" for name, weight in weights.items()
            )
            say(f"{self.title}weights of the layers: {', '.join(listed)}")
        if verdict is not None:
            verdict.tell(self.title)
        elif self.group.main:
            say(f"{self.title}{translated(NO_VERDICT)}")
        before = None if self.config.init is None else self.loss_before
        if before is not None and before < self.best < math.inf:
            losses = f"held-out loss {before:.4f} there, {self.best:.4f} here"
            lower = "--lr" if self.config.tune == "projector" else "--lr and --lr-llm"
            say(f"{self.title}no step was better than {self.config.init}: {losses}; try a lower {lower}")
        return summary

    def diverged(self, loss: float, step: int) -> LlavaError:
        """The error for a loss that is not finite at `step`, 0 before the first."""
        if not step:
            return LlavaError(
                f"the held-out loss is {loss} before the first step",
                do="look for numbers that are not finite in the features, held-out ones too, or in --init",
            )
        _, indices = self.schedule.at(step - 1)
        picked = [self.samples.place(index) for index in indices]
        rows = [f"{self.samples.shards[shard].path.name}:{row}" for shard, row in picked]
        return LlavaError(
            f"the loss is {loss} at step {step}, learning rate {self.learning_rate(step - 1):.2e}",
            got=f"rows {', '.join(rows)}",
            do="begin again in another --out with a lower --lr",
        )
