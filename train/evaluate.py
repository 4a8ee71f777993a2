"""What a projector is worth on held-out rows: loss, perplexity, and whether it looks at the picture."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch

from llava_core.bootstrap import by_picture, figure_rows, interval, redrawn
from llava_core.cli.console import progress, say, show, table
from llava_core.language.conversation import Conversation
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import Projector
from llava_core.shards.folder import open_shards
from llava_core.shuffled_pairs import mismatched_rows
from llava_core.types import JsonDict
from train.config import EvalConfig
from train.data.packing import Packing
from train.data.samples import Batch, Samples, answer_tokens
from train.distributed import World, joined
from train.model.loss import sample_losses
from train.model.packed_model import prepare

INTERVALS = ("loss", "perplexity", "grounding_gap")
"""Figures that have a 95 % interval."""
ONE_PICTURE = "grounding gap not defined: all held-out rows show one picture"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out losses, and what follows from them."""

    samples: int
    sums: np.ndarray
    """Of each picture, fp64 [pictures, 3]: nats of its answers; nats of the same beside another picture, 0 if
    there is none; tokens of these answers."""

    @functools.cached_property
    def figures(self) -> JsonDict:
        """`loss` in nats per answer token, `perplexity`, `loss_shuffled`, `grounding_gap`, counts.

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
    world: World,
) -> Evaluation:
    """The losses of these samples, with the right pictures and with others (llava_core.shuffled_pairs)."""
    n, others = len(samples), mismatched_rows(samples.pictures)
    visual = projector.tokens_out(samples.tokens)
    sums = np.zeros((n, 3))

    def losses(batch: Batch) -> np.ndarray:
        rows = packing.rows(batch.to(llm.device), [visual])
        return torch.cat([sample_losses(llm, projector, row) for row in rows]).numpy()

    starts = world.part(range(0, n, batch_size))
    with world.together(), progress(n, "samples", desc="evaluate", leave=False) as bar:
        for start in starts:
            indices = list(range(start, min(start + batch_size, n)))
            batch = samples.batch(indices, epoch=0)
            sums[indices, 0] = losses(batch)
            if others:
                sums[indices, 1] = losses(
                    Batch(samples.features([others[i] for i in indices]), batch.examples)
                )
            sums[indices, 2] = [answer_tokens([example]) for example in batch.examples]
            bar.update(len(indices) * world.size)
    sums = np.reshape(world.sum(*sums.ravel().tolist()), sums.shape)
    return Evaluation(n, by_picture(sums, samples.pictures))


def run(config: EvalConfig) -> JsonDict:
    """`train eval`: print and return the figures of `evaluate`."""
    with joined() as world:
        with world.together():
            llm, projector, samples = _load(config, world)
        packing = Packing(config.micro_tokens)
        figures = evaluate(llm, projector, samples, config.batch_size, packing, world).figures
    show(table(figure_rows(figures)))
    if figures["grounding_gap"] is None:
        say(ONE_PICTURE)
    return figures


def _load(config: EvalConfig, world: World) -> tuple[LanguageModel, Projector, Samples]:
    checkpoint = load_checkpoint(config.checkpoint)
    shards = open_shards(config.features)
    checkpoint.provenance.require_encoder(shards[0].identity)
    device = world.device(config.device)
    llm = load_language_model(config.llm, device)
    checkpoint.provenance.require_language_model(llm.identity)
    prepare(llm)
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    samples = Samples(shards, conversation, config.max_text_tokens, config.max_samples, seed=0)
    say(f"{len(samples)} held-out samples of {config.features}")
    return llm, checkpoint.projector.to(device), samples
