"""Answers, token by token: what `infer` says, and what `train` shows while it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from transformers import DynamicCache

from llava_core.errors import LlavaError
from llava_core.language import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@torch.inference_mode()
def generate(
    llm: LanguageModel, embedded: torch.Tensor, sampling: Sampling, cache: DynamicCache | None = None
) -> Iterator[list[int | None]]:
    """Inputs [B, L, hidden] after what `cache` holds -> each step's token of every sequence.

    None stands for a sequence that has ended; end tokens are not given out. Stops when all have ended, at
    `max_tokens`, or when the model's context is full.
    """
    cache = DynamicCache() if cache is None else cache
    generator = torch.Generator(llm.device).manual_seed(sampling.seed)
    context = int(getattr(llm.model.config, "max_position_embeddings", 1 << 30))
    room = context - cache.get_seq_length() - embedded.shape[1]
    if room <= 0:
        raise LlavaError(
            "the conversation no longer fits the language model's context",
            expected=f"at most {context} tokens",
            got=context - room,
            do="begin anew with `clear`",
        )
    ended = [False] * len(embedded)
    for _ in range(min(sampling.max_tokens, room)):
        out = llm.model(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen = choose(out.logits[:, -1].float(), sampling, generator)
        tokens: list[int] = chosen.tolist()
        ended = [done or token in llm.eos_ids for done, token in zip(ended, tokens, strict=True)]
        if all(ended):
            return
        yield [None if done else token for done, token in zip(ended, tokens, strict=True)]
        embedded = llm.embed(chosen[:, None])


def choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Logits [B, V] -> tokens [B]: the likeliest, or drawn from the nucleus `top_p` (arXiv:1904.09751)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)
