"""How the blocks of a language model compute: as transformers writes them, compiled, or recomputing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from train.model.loss import COMPILED, loss_to_compile

MOST_GRAPHS = 1024
"""Graphs that a block may have: more than occur, since torch ends the run at its limit."""


def compile_blocks(llm: LanguageModel) -> str:
    """Compile each block, which share what is compiled for one; returns why that cannot be done, or ""."""
    blocks = getattr(llm.model.base_model, "layers", None)
    if blocks is None:
        return "no list of blocks in it"
    as_written(llm)
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = MOST_GRAPHS
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)  # from the second row length on for any
    setattr(llm.model, COMPILED, torch.compile(loss_to_compile, fullgraph=True))
    return ""


def recompute_activations(llm: LanguageModel) -> None:
    """Keep only what goes into each block for the backward pass (gradient checkpointing)."""
    blocks = getattr(llm.model.base_model, "layers", None)
    if blocks is None:
        raise LlavaError("--gradient-checkpointing", expected="a model with a list of blocks", got=llm.id)
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compilations() -> int:
    """Number of graphs that torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def original_attention(llm: LanguageModel, kind: str = "sdpa") -> Iterator[None]:
    """The model with its own attention and blocks as written, in the `with` block: generating needs a cache.

    `kind` is "sdpa", where the model has it, or "eager".
    """
    config, replaced = llm.model.config, as_written(llm)
    packed = config._attn_implementation
    config._attn_implementation = kind if getattr(llm.model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = packed
        for (module, name), function in replaced.items():
            setattr(module, name, function)


def as_written(llm: LanguageModel) -> dict[tuple[Any, str], Any]:
    """Undo `compile_blocks`, `write_out`, `recompute_activations`; returns the functions so far, by their
    places."""
    blocks = getattr(llm.model.base_model, "layers", ())
    places = [*((block, "forward") for block in blocks), (llm.model, COMPILED)]
    return {(module, name): vars(module).pop(name) for module, name in places if name in vars(module)}
