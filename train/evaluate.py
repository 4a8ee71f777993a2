"""What a projector is worth on held-out rows: loss, perplexity, and whether it looks at the picture."""

from __future__ import annotations

import math

import torch

from llava_core.checkpoint import load_checkpoint
from llava_core.console import progress, say, table
from llava_core.conversation import Conversation
from llava_core.features import open_shards
from llava_core.fingerprint import JsonDict
from llava_core.language import LanguageModel, load_language_model
from llava_core.projector import Projector
from train.config import EvalConfig
from train.objective import summed_losses
from train.packing import Packing
from train.parallel import World, joined
from train.prepare import prepare
from train.samples import Batch, Samples, answer_tokens


@torch.no_grad()
def evaluate(
    llm: LanguageModel,
    projector: Projector,
    samples: Samples,
    batch_size: int,
    packing: Packing,
    world: World,
) -> JsonDict:
    """Held-out `loss` (nats per answer token), `perplexity`, `loss_shuffled`, `grounding_gap`.

    The grounding gap is the loss with every caption beside the next row's picture, minus the loss with the
    right one: 0 means that the answers ignore the picture. It is None for a single sample.
    """
    n, shuffle = len(samples), len(samples) > 1
    visual = projector.tokens_out(samples.tokens)
    right, shuffled, tokens = 0.0, 0.0, 0
    starts = world.part(range(0, n, batch_size))
    with world.together(), progress(n, "samples", desc="evaluate", leave=False) as bar:
        for start in starts:
            indices = list(range(start, min(start + batch_size, n)))
            batch = samples.batch(indices, epoch=0)
            for row in packing.rows(batch.to(llm.device), [visual]):
                right += float(*summed_losses(llm, [projector], row))
            tokens += answer_tokens(batch.examples)
            if shuffle:
                others = Batch(samples.features([(i + 1) % n for i in indices]), batch.examples)
                for row in packing.rows(others.to(llm.device), [visual]):
                    shuffled += float(*summed_losses(llm, [projector], row))
            bar.update(len(indices) * world.size)
    right, shuffled, tokens = *world.sum(right, shuffled), int(world.sum(tokens)[0])
    loss = right / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "loss_shuffled": shuffled / tokens if shuffle else None,
        "grounding_gap": (shuffled - right) / tokens if shuffle else None,
        "samples": n,
        "answer_tokens": tokens,
    }


def run(config: EvalConfig) -> JsonDict:
    """`train eval`: print and return the figures of `evaluate`."""
    with joined() as world:
        with world.together():
            llm, projector, samples = _load(config, world)
        packing = Packing(config.micro_tokens)
        figures = evaluate(llm, projector, samples, config.batch_size, packing, world)
    print(table([(name.replace("_", " "), _shown(value)) for name, value in figures.items()]))
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


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else f"{value:,}"
