"""A frozen language model made ready for rows of packs: its attention exchanged, checked, and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llava_core.console import say
from llava_core.conversation import IGNORE, Example
from llava_core.errors import LlavaError, first_line
from llava_core.language import LanguageModel
from train.attention import ATTENTION, CHOSEN, KERNELS, one_by_one
from train.config import Compile
from train.objective import read
from train.packing import Packing, pack

LENGTHS = [9, 5]
"""Tokens of the samples by which a model is checked."""
MOST_SHAPES = 1024
"""Of rows, that a model may be compiled for: more than there are, since torch ends the run at its limit."""


def prepare(llm: LanguageModel, compiled: Compile = "off") -> bool:
    """Let the language model take packs, by the fastest attention that is right here; True if compiled.

    Raises LlavaError unless packed samples give the logits and gradients that they give alone: a head of
    more than one matrix, layers other than attention, or attention of its own kind would make the loss
    silently wrong.
    """
    with own_attention(llm):
        alone = _alone(llm)
    llm.model.config._attn_implementation = ATTENTION
    kind, reason = llm.device.type, ""
    for kernel in KERNELS[kind]:
        try:
            CHOSEN[kind] = kernel()
        except (ImportError, AttributeError) as error:
            reason = first_line(error)
            continue
        if not (reason := _difference(llm, alone)):
            break
    else:
        raise LlavaError(
            f"this trainer cannot pack samples for a {llm.identity.architecture}",
            expected="plain causal attention and a plain vocabulary head, as in Qwen3 or Llama",
            got=reason,
        )
    # Where it pays: on a GPU, unless the attention is a loop of Python's.
    if compiled == "off" or (compiled == "auto" and (kind == "cpu" or CHOSEN[kind] is one_by_one)):
        return False
    if not (reason := compile_blocks(llm) or _difference(llm, alone)):
        return True
    if compiled == "on":
        raise LlavaError("cannot compile the language model", got=reason, do="leave out --compile on")
    _as_written(llm)
    say(f"the language model is not compiled: {reason}")
    return False


def compile_blocks(llm: LanguageModel) -> str:
    """Compile each block on its own: they share their code, so all cost what one costs. Why not, or ""."""
    blocks = getattr(llm.model.base_model, "layers", None)
    if blocks is None:
        return "no list of blocks in it"
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = MOST_SHAPES
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, fullgraph=True)
    return ""


def compilations() -> int:
    """How often torch has compiled anything in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def own_attention(llm: LanguageModel) -> Iterator[None]:
    """The model as transformers made it, for a while: generating needs a cache, unknown to packs."""
    config, compiled = llm.model.config, _as_written(llm)
    packed = config._attn_implementation
    config._attn_implementation = "sdpa" if getattr(llm.model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = packed
        for block, forward in compiled.items():
            block.forward = forward


def _as_written(llm: LanguageModel) -> dict[Any, Any]:
    """Undo `compile_blocks`; returns what each block ran instead."""
    blocks = getattr(llm.model.base_model, "layers", ())
    return {block: vars(block).pop("forward") for block in blocks if "forward" in vars(block)}


def _alone(llm: LanguageModel) -> list[torch.Tensor]:
    """Logits of each sample of LENGTHS alone, and the gradient that they send to the embeddings."""
    logits, gradients = [], []
    for ids in _samples(llm):
        embedded = llm.embed(ids)[None].requires_grad_()
        logits.append(llm.model(inputs_embeds=embedded, use_cache=False).logits[0])
        gradients.append(_gradient(logits[-1], embedded))
    return [torch.cat(logits).detach(), torch.cat(gradients, 1)]


def _difference(llm: LanguageModel, alone: list[torch.Tensor]) -> str:
    """How the same samples in one row differ from `_alone`; "" if they do not."""
    ids = _samples(llm)
    words = [Example(part.tolist(), [IGNORE] * len(part), cut=False) for part in ids]
    row = Packing(sum(LENGTHS)).row([(0, pack(torch.zeros(len(ids), 0, 1, device=llm.device), 0, words))])
    try:
        embedded = llm.embed(torch.cat(ids))[None].requires_grad_()
        logits = read(llm, embedded[0], row) @ llm.head.T
        packed = [logits.detach(), _gradient(logits, embedded)]
    except (AttributeError, ImportError, LlavaError, RuntimeError, TypeError, ValueError) as error:
        return first_line(error)
    precise = llm.dtype == torch.float32
    for what, got, expected, close in (
        ("logits", packed[0], alone[0], 1e-4 if precise else 3e-2),
        ("gradients", packed[1], alone[1], 1e-3 if precise else 1e-1),
    ):
        distance = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not distance < close:
            return f"packed {what} {distance:.1%} away from those of samples alone"
    return ""


def _samples(llm: LanguageModel) -> list[torch.Tensor]:
    return list(torch.split(torch.arange(sum(LENGTHS), device=llm.device), LENGTHS))


def _gradient(logits: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)[0]
