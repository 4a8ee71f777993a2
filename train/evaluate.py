"""Held-out loss, perplexity and grounding gap of a projector."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llava_core.bootstrap import by_picture, figure_rows, interval, redrawn
from llava_core.cli.console import progress, say, show, table
from llava_core.device import Later
from llava_core.fusion import FusedIdentity
from llava_core.input_folders import folders_of
from llava_core.language.model import LanguageModel
from llava_core.projector.aligned import load_aligned
from llava_core.projector.checkpoint import Checkpoint, load_checkpoint
from llava_core.projector.projector import Projector
from llava_core.shards.fused import require_each_encoder
from llava_core.shuffled_pairs import mismatched_rows
from llava_core.types import JsonDict
from train.config import EvalConfig, RunConfig
from train.data.batch import Batch, answer_tokens
from train.data.figures import data_figures
from train.data.packing import Packing
from train.data.prefetch import prefetch
from train.data.samples import Samples
from train.distributed import ProcessGroup, joined
from train.flags import BEFORE, OLD_INSTRUCTIONS
from train.metric_writers import logged
from train.model.loss import token_losses
from train.resources import TrainingResources
from train.run_folder import UNREADABLE
from train.sample_captions import captions
from train.verdict import ANSWERS, verdict_of

INTERVALS = ("loss", "perplexity", "grounding_gap")
"""Figures that have a 95 % interval."""
MEASURED = 16
"""Pictures whose visual tokens' size is measured."""
ONE_PICTURE = "grounding gap not defined: all held-out rows show one image"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out losses by picture, and the figures that follow from them."""

    samples: int
    """Those with a picture."""
    sums: np.ndarray
    """Sums for each picture, fp64 [pictures, 3]: nats of its answers; nats of the same answers beside another
    picture, 0 if there is none; tokens of these answers."""
    parts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Such sums by the name of a loss: `loss/NAME` of each source, if there are several, over all its rows;
    `loss_text` of the rows without a picture, if there are any."""

    @functools.cached_property
    def figures(self) -> JsonDict:
        """`loss` in nats per answer token, `perplexity`, `loss_shuffled`, `grounding_gap`, counts.

        All but `parts` are over rows with a picture, as in stage 1.

        The gap is the loss with every caption beside another picture minus the loss with the right one: 0
        means that the answers ignore the picture, None that there is one picture only. `_low` and `_high` end
        the 95 % interval of a figure, over pictures (llava_core.bootstrap); None for a single one.
        """
        several = len(self.sums) > 1
        right, shuffled, tokens = self.sums.sum(0).tolist()
        loss = right / tokens
        figures: JsonDict = {"loss": loss, "perplexity": _perplexity(loss)}
        figures |= {"loss_shuffled": shuffled / tokens if several else None}
        figures |= {"grounding_gap": (shuffled - right) / tokens if several else None}
        figures |= {f"{name}_{end}": None for name in INTERVALS for end in ("low", "high")}
        if several:
            rights, others, tokens_drawn = redrawn(self.sums).T
            losses = rights / tokens_drawn
            figures |= interval("loss", losses)
            figures |= {f"perplexity_{end}": _perplexity(figures[f"loss_{end}"]) for end in ("low", "high")}
            figures |= interval("grounding_gap", others / tokens_drawn - losses)
        for name, own in self.parts.items():
            nats, _, count = own.sum(0).tolist()
            figures |= {name: nats / count, f"{name}_low": None, f"{name}_high": None}
            if len(own) > 1:
                drawn = redrawn(own)
                figures |= interval(name, drawn[:, 0] / drawn[:, 2])
        return figures | {
            "samples": self.samples,
            "pictures": len(self.sums),
            "answer_tokens": round(tokens),
        }


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


@torch.no_grad()
def evaluate(
    llm: LanguageModel,
    projector: Projector,
    samples: Samples,
    batch_size: int,
    packing: Packing,
    group: ProcessGroup,
) -> Evaluation:
    """Losses of these samples, with the right pictures and with others (llava_core.shuffled_pairs)."""
    n, shown = len(samples), samples.with_picture.tolist()
    mismatched = mismatched_rows([samples.pictures[index] for index in shown])
    others = {index: shown[k] for index, k in zip(shown, mismatched, strict=True)} if mismatched else {}
    visual = projector.tokens_out(samples.tokens)
    sums = np.zeros((n, 3))

    def load(start: int) -> list[tuple[int, list[int], Batch]]:
        """The batch from a sample on, and beside other pictures: the column of `sums`, indices, samples."""
        indices = list(range(start, min(start + batch_size, n)))
        right = samples.batch(indices, epoch=0)
        batches = [(0, indices, right)]
        if beside := [i for i in indices if i in others]:
            features = samples.features([others[i] for i in beside])
            examples = [example for example in right.examples if example.picture]
            batches.append((1, beside, dataclasses.replace(right, features=features, examples=examples)))
        return batches if llm.device.type != "cuda" else [(c, i, some.pinned()) for c, i, some in batches]

    def losses(batch: Batch) -> Later:
        rows = packing.rows(batch.to(llm.device), [visual])
        return Later(torch.cat([token_losses(llm, projector, row) for row in rows]))

    def add(column: int, indices: list[int], batch: Batch, nats: Later) -> None:
        counts = [answer_tokens([example]) for example in batch.examples]
        own = np.repeat(indices, counts)
        np.add.at(sums[:, column], own, nats.read().double().numpy())
        if column == 0:
            sums[indices, 2] = counts
            bar.update(len(indices) * group.size)

    with (
        group.same_outcome(),
        progress(n, "samples", desc="evaluate", leave=False) as bar,
        contextlib.closing(prefetch(load, group.shard(range(0, n, batch_size)))) as loaded,
    ):
        unread: list[tuple[int, list[int], Batch, Later]] = []
        for each in itertools.chain.from_iterable(loaded):
            unread.append((*each, losses(each[-1])))
            if len(unread) > 1:  # a batch late, so that the device need not wait for the host
                add(*unread.pop(0))
        for last in unread:
            add(*last)
    sums = np.reshape(group.sum(*sums.ravel().tolist()), sums.shape)

    def of(indices: Sequence[int]) -> np.ndarray:
        own = np.unique([samples.pictures[index] for index in indices], return_inverse=True)[1]
        return by_picture(sums[list(indices)], own.tolist())

    several = len(samples.sizes) > 1
    parts = {f"loss/{name}": of(indices) for name, indices in samples.by_source()} if several else {}
    if text := [index for index in range(n) if not samples.has_picture(index)]:
        parts["loss_text"] = of(text)
    return Evaluation(len(shown), of(shown), parts)


@torch.no_grad()
def visual_rms(llm: LanguageModel, projector: Projector, samples: Samples) -> float:
    """RMS of the visual tokens of MEASURED pictures, over that of the embeddings of words."""
    features = samples.features(samples.with_picture[:MEASURED].tolist())
    tokens = projector(features.float().to(llm.device))
    return float(tokens.float().square().mean().sqrt()) / llm.embedding_rms


def run(config: EvalConfig) -> JsonDict:
    """`train eval`: print and return the figures of `evaluate`."""
    with joined() as group:
        with group.same_outcome():
            resources, projector, samples = _load(config, group)
        packing = Packing(config.micro_tokens, context=resources.llm.context)
        figures = evaluate(resources.llm, projector, samples, config.batch_size, packing, group).figures
        loud = visual_rms(resources.llm, projector, samples)
        answers = captions(resources.llm, projector, samples, ANSWERS) if group.main else []
    show(table(figure_rows(figures)))
    if figures["grounding_gap"] is None:
        say(ONE_PICTURE)
    own = {f"eval_{name}": value for name, value in figures.items()}
    own |= {"eval_captions": answers, "eval_visual_rms": loud}
    checkpoint = load_checkpoint(config.checkpoint)
    own |= {"step": checkpoint.metrics.get("eval_step", 0)} | data_figures(samples)
    continued = checkpoint.training.get("init") is not None
    verdict = verdict_of([*_curve(config, checkpoint, samples), own], continued)
    assert verdict is not None
    verdict.tell()
    return figures | verdict.to_json()


def _curve(config: EvalConfig, checkpoint: Checkpoint, samples: Samples) -> list[JsonDict]:
    """What its run has logged before the checkpoint, if that was evaluated on the same rows, with as many
    tokens and the same instructions."""
    run, trained = checkpoint.folder.resolve().parent, BEFORE | checkpoint.training
    if "eval_step" not in checkpoint.metrics or not (run / "held_out.npz").exists():
        return []
    try:
        with np.load(run / "held_out.npz") as kept:
            same = str(kept["pictures"]) == samples.pictures_identity
    except UNREADABLE:
        same = False
    same &= config.max_text_tokens == trained["max_text_tokens"]
    if not same or config.instructions not in (None, trained["instructions"]):
        say(
            f"{run} was evaluated on other rows (--eval-samples {trained['eval_samples']}), or with other "
            "--max-text-tokens or --instructions; the verdict is by these rows alone"
        )
        return []
    end = checkpoint.metrics["eval_step"]
    lines = logged(run / "metrics.jsonl")
    return [line for line in lines if line["step"] < end or (line["step"] == end and "loss" in line)]


def _load(config: EvalConfig, group: ProcessGroup) -> tuple[TrainingResources, Projector, Samples]:
    """The held-out rows are those that a run with these flags would train on."""
    given = ("features", "text", "rows", "llm", "max_samples", "max_text_tokens", "device")
    flags: dict[str, Any] = {name: getattr(config, name) for name in given}
    checkpoint = load_checkpoint(config.checkpoint)
    trained = checkpoint.training.get("instructions", OLD_INSTRUCTIONS)
    flags["instructions"] = trained if config.instructions is None else config.instructions
    flags["tune"] = checkpoint.tune or "projector"  # without the language model's training no text is judged
    encoder = checkpoint.provenance.encoder
    if isinstance(encoder, FusedIdentity):
        require_each_encoder(folders_of(config.features), encoder, "--features")
        flags["fuse"] = encoder.kind
    run_config = RunConfig(out=config.checkpoint, compile="off", **flags)
    resources = TrainingResources(run_config, group, trained=encoder)
    checkpoint = load_aligned(config.checkpoint, resources.provenance)
    checkpoint.tune_model(resources.llm)
    samples, _ = resources.samples(run_config)
    say(f"{len(samples)} held-out samples of {', '.join(map(str, folders_of(config.features)))}")
    for line in samples.described():
        say(line)
    return resources, checkpoint.projector.to(resources.device), samples
