"""Answers, token by token: what `infer` says, and what `train` shows while it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from transformers import DynamicCache

from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import MIN_TEMPERATURE, Sampling


@torch.inference_mode()
def generate(
    llm: LanguageModel,
    embedded: torch.Tensor,
    sampling: Sampling,
    cache: DynamicCache | None = None,
    compiled: CompiledStep | None = None,
    over: Callable[[int], bool] = lambda sequence: False,
    seeds: Sequence[int] | None = None,
) -> Generator[list[int | None], None, None]:
    """Inputs [B, L, hidden] after what `cache` holds -> each step's token of every sequence.

    None stands for a sequence that has ended; end tokens are not given out. Stops when all have ended, at
    `max_tokens`, or when the model's context is full; stop texts are for whoever turns tokens into text, who
    may say that a sequence is `over`.
    Once closed, `cache` holds what was read. A single sequence may be read by `compiled`. Each sequence draws
    by its own one of `seeds`, whatever its company; by default all have the sampling's.
    """
    cache = llm.new_cache() if cache is None else cache
    seeds = [sampling.seed] * len(embedded) if seeds is None else seeds
    generators = [torch.Generator(llm.device).manual_seed(seed) for seed in seeds]
    known = cache.get_seq_length() + embedded.shape[1]
    llm.require_context("the question", known + 1, do="shorten it")  # and an answer's first token
    limit = min(sampling.max_tokens, llm.context - known)
    ended = [False] * len(embedded)
    said = torch.empty(len(embedded), 0, dtype=torch.long, device=llm.device)
    with reading(llm, cache, compiled, known + limit) as read:
        for _ in range(limit):
            chosen = choose(read(embedded).float(), sampling, generators, said)
            tokens: list[int] = chosen.tolist()
            ended = [done or token in llm.eos_ids for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
            ended = [done or over(sequence) for sequence, done in enumerate(ended)]
            if all(ended):
                return
            said = torch.cat([said, chosen[:, None]], dim=1)
            embedded = llm.embed(chosen[:, None])


@contextlib.contextmanager
def reading(
    llm: LanguageModel, cache: DynamicCache, compiled: CompiledStep | None, length: int
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function that reads inputs [B, L, hidden] after `cache` and gives the last one's logits [B, V]."""

    def read(embedded: torch.Tensor) -> torch.Tensor:
        out = llm.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    if compiled is None:
        yield read
        return
    compiled.begin(cache, length)
    try:
        yield compiled.read
    finally:
        compiled.end()


def choose(
    logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator], said: torch.Tensor
) -> torch.Tensor:
    """Logits [B, V], a generator for each, and the answers' tokens so far [B, n] -> the next tokens [B].

    The likeliest, or drawn from the `top_k` likeliest and of these from the nucleus `top_p`
    (arXiv:1904.09751), after the penalty on tokens of the answer (arXiv:1909.05858).
    """
    if sampling.repetition_penalty != 1:
        penalty, again = sampling.repetition_penalty, logits.gather(-1, said)
        logits = logits.scatter(-1, said, torch.where(again > 0, again / penalty, again * penalty))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / max(sampling.temperature, MIN_TEMPERATURE)
    few = 0 < sampling.top_k < logits.shape[-1]
    ranked, order = logits.topk(sampling.top_k) if few else logits.sort(-1, descending=True)
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    beyond = before >= sampling.top_p
    beyond[..., 0] = False  # a nucleus is never empty
    probabilities = probabilities.masked_fill(beyond, 0)
    rows = zip(probabilities, generators, strict=True)
    drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
    return order.gather(-1, drawn).squeeze(-1)


def already_read(cached: Sequence[int], ids: Sequence[int]) -> int:
    """Leading tokens of a prompt that a cache holds; its last one is always read again."""
    same = 0
    while same < min(len(cached), len(ids) - 1) and cached[same] == ids[same]:
        same += 1
    return same
