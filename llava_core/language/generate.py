"""Autoregressive generation: forward passes over a KV cache, and the choice of the next token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from transformers import DynamicCache

from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import MIN_TEMPERATURE, Sampling

NOT_FINITE = -1
"""In the place of a token, where the model's logits are not finite."""


def not_finite(llm: LanguageModel) -> str:
    """The fault that NOT_FINITE stands for, as a clause."""
    return f"the logits of {llm.id} are not finite"


@torch.inference_mode()
def generate(
    llm: LanguageModel,
    embedded: torch.Tensor,
    sampling: Sampling,
    cache: DynamicCache | None = None,
    compiled: CompiledStep | None = None,
    stopped: Callable[[int], bool] = lambda sequence: False,
    seeds: Sequence[int] | None = None,
) -> Generator[list[int | None], None, None]:
    """Inputs [B, L, hidden] after what `cache` holds -> for each step the next token of every sequence.

    None stands for a sequence that has ended; end tokens are not yielded. Generation stops when all sequences
    have ended, at `max_tokens`, or when the model's context is full. Stop texts are the caller's: `stopped`
    says whether a sequence has reached one.
    Once closed, `cache` holds every token that went through the model. A single sequence may be decoded by
    `compiled`. Each sequence is sampled by its own one of `seeds`, independently of the others in the batch;
    by default all have the sampling's. Raises LlavaError if no token fits the model's context, or if logits
    are not finite.
    """
    cache = llm.new_cache() if cache is None else cache
    seeds = [sampling.seed] * len(embedded) if seeds is None else seeds
    generators = [torch.Generator(llm.device).manual_seed(seed) for seed in seeds]
    known = cache.get_seq_length() + embedded.shape[1]
    llm.require_context("the question", known + 1, do="shorten it")  # and an answer's first token
    limit = sampling.limit(llm.context - known)
    ended = [False] * len(embedded)
    generated = torch.empty(len(embedded), 0, dtype=torch.long, device=llm.device)
    with forward_pass(llm, cache, compiled, known + limit) as forward:
        for _ in range(limit):
            chosen = choose(forward(embedded).float(), sampling, generators, generated)
            tokens: list[int] = chosen.tolist()
            if NOT_FINITE in tokens:
                raise LlavaError(not_finite(llm))
            ended = [done or token in llm.eos_ids for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            ended = [done or stopped(sequence) for sequence, done in enumerate(ended)]
            if all(ended):
                return
            generated = torch.cat([generated, chosen[:, None]], dim=1)
            embedded = llm.embed(chosen[:, None])


@contextlib.contextmanager
def forward_pass(
    llm: LanguageModel, cache: DynamicCache, compiled: CompiledStep | None, length: int
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function of inputs [B, L, hidden] that extends `cache` and returns the last one's logits [B, V]."""

    def forward(embedded: torch.Tensor) -> torch.Tensor:
        out = llm.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    if compiled is None:
        yield forward
        return
    compiled.begin(cache, length)
    try:
        yield compiled.forward
    finally:
        compiled.end()


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator], generated: torch.Tensor
) -> torch.Tensor:
    """Logits [B, V], a generator for each, and the answers' tokens so far [B, n] -> the next tokens [B].

    At temperature 0 the argmax; otherwise sampled from the `top_k` most probable, and among these from the
    nucleus `top_p` (arXiv:1904.09751), after the repetition penalty (arXiv:1909.05858). NOT_FINITE where
    logits are not finite. Nothing is read from the device.
    """
    finite = logits.amax(-1).isfinite()
    if sampling.repetition_penalty != 1:
        penalty, repeated = sampling.repetition_penalty, logits.gather(-1, generated)
        penalised = torch.where(repeated > 0, repeated / penalty, repeated * penalty)
        logits = logits.scatter(-1, generated, penalised)
    if sampling.temperature == 0:
        return torch.where(finite, logits.argmax(-1), NOT_FINITE)
    logits = logits / max(sampling.temperature, MIN_TEMPERATURE)
    few = 0 < sampling.top_k < logits.shape[-1]
    ranked, order = logits.topk(sampling.top_k) if few else logits.sort(-1, descending=True)
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    beyond = before >= sampling.top_p
    beyond[..., 0] = False  # a nucleus is never empty
    probabilities = probabilities.masked_fill(beyond, 0)
    # As torch.multinomial draws, which would read from the device whether the probabilities are some.
    rows = zip(probabilities, generators, strict=True)
    races = torch.stack([torch.empty_like(row).exponential_(generator=generator) for row, generator in rows])
    drawn = (probabilities / races).argmax(-1, keepdim=True)
    return torch.where(finite, order.gather(-1, drawn).squeeze(-1), NOT_FINITE)


def cached_prefix(cached: Sequence[int], ids: Sequence[int]) -> int:
    """Number of leading prompt tokens that a cache holds, without the last one: it gives the logits."""
    same = 0
    while same < min(len(cached), len(ids) - 1) and cached[same] == ids[same]:
        same += 1
    return same
