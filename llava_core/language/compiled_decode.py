"""The language model's step for one token, compiled over a cache whose size never changes.

A step of a small model is mostly overhead: Python, and the launch of hundreds of small operations. Compiled
they are a few; on a GPU torch also records them as one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel

LEAST_LENGTH = 1024
"""Tokens of the first cache; each larger one is at least twice as long, since it is compiled anew."""


def compiled_forward(llm: LanguageModel) -> Callable[..., Any]:
    """The model's forward pass, compiled for each shape it is given."""
    mode = "reduce-overhead" if llm.device.type == "cuda" else "default"
    compiled: Callable[..., Any] = torch.compile(llm.model.forward, dynamic=False, mode=mode)
    return compiled


class CompiledStep:
    """The model's forward pass: between `begin` and `end` first the prompt, then token by token."""

    def __init__(self, llm: LanguageModel, length: int = LEAST_LENGTH) -> None:
        """Raises LlavaError if this transformers has no fixed cache that counts for itself (5 has)."""
        if not llm.can_rewind:
            raise LlavaError(
                "--compile cannot keep what this language model remembers",
                expected="layers of attention",
                got=", ".join(llm.layer_types),
                do="leave out --compile",
            )
        self._llm = llm
        self._length, self._fixed = length, self._static_cache(length)
        self._cache, self._started = llm.new_cache(), False
        if not hasattr(next(iter(getattr(self._fixed, "layers", [])), None), "cumulative_length"):
            raise LlavaError("--compile needs a newer transformers", do="pip install --upgrade transformers")
        self._step = compiled_forward(llm)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile now, so that the first answer need not wait."""
        token = self._llm.embed(torch.zeros(1, 1, dtype=torch.long, device=self._llm.device))
        self.begin(self._llm.new_cache(), self._length)
        for _ in range(4):  # the prompt, and on a GPU a graph is recorded in the second step
            self.forward(token)

    def begin(self, cache: DynamicCache, length: int) -> None:
        """Go on after what `cache` holds, up to `length` tokens in all."""
        self._cache, self._started = cache, False
        if length > self._length:
            self._length = max(length, 2 * self._length)
            self._fixed = self._static_cache(self._length)

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        """Inputs [1, L, hidden] -> logits [1, V], valid until the next call; L is 1 after the first call."""
        prompt = not self._started
        forward, cache = (self._llm.model, self._cache) if prompt else (self._step, self._fixed)
        out = forward(inputs_embeds=embedded, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if prompt:
            self._fixed.reset()
            for index, layer in enumerate(self._cache.layers):
                self._fixed.update(layer.keys, layer.values, index)
            self._started = True
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def end(self) -> None:
        """Add the keys and values of the tokens after the prompt to the cache of `begin`."""
        if self._started:
            known, length = self._cache.get_seq_length(), int(self._fixed.get_seq_length())
            for index, layer in enumerate(self._fixed.layers):
                new = slice(known, length)
                self._cache.update(layer.keys[:, :, new], layer.values[:, :, new], index)
            self._started = False

    def _static_cache(self, length: int) -> StaticCache:
        return StaticCache(config=self._llm.model.config, max_cache_len=length, max_batch_size=1)
