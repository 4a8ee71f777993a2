"""The frozen causal language model: embeddings, vocabulary head, context length, KV cache, identity."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

from llava_core.errors import LlavaError, first_line
from llava_core.identity import LanguageModelIdentity
from llava_core.types import JsonDict

logging.disable_progress_bar()

ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers whose cache is one key and one value per token."""

SETTINGS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "hidden_activation"),
    *("rms_norm_eps", "layer_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"),
    *("sliding_window", "rope_theta", "rope_type", "factor", "partial_rotary_factor"),
)
"""Keys of config.json that change what the weights compute but show in no shape."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model in eval mode whose weights take no gradients."""

    model: Any
    """The transformers model; `.model` in it is the stack of blocks, without the vocabulary head."""
    tokenizer: Any
    id: str
    """Name of its folder."""
    weights_sha256: str | None
    """sha256 of the weight files; None for an outline, which has no weights."""
    embedding_rms: float
    """Root mean square of the numbers that `embed` gives: the initial scale of projected tokens."""
    eos_ids: frozenset[int]
    """Ids of the end tokens (EOS)."""
    embedding_scale: float = 1.0
    """Factor that `embed` applies to the embedding weights: sqrt(hidden) in Gemma, 1 in most models."""

    @functools.cached_property
    def identity(self) -> LanguageModelIdentity:
        """The identity that a projector checkpoint records."""
        return LanguageModelIdentity.of_tokenizer(
            self.tokenizer,
            self.eos_ids,
            id=self.id,
            weights_sha256=self.weights_sha256,
            hidden=self.hidden,
            architecture=type(self.model).__name__,
            settings=_settings(self.model.config),
            embedding_scale=self.embedding_scale,
        )

    @property
    def hidden(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> torch.nn.Embedding:
        layer: torch.nn.Embedding = self.model.get_input_embeddings()
        return layer

    @property
    def head(self) -> torch.Tensor:
        """Weight of the vocabulary head, [vocabulary, hidden]."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def context(self) -> int:
        """Context length in tokens, visual tokens included."""
        return context_of(self.model.config)

    def require_context(self, what: str, tokens: int, do: str) -> None:
        """Raise LlavaError if `what` has more tokens than the context."""
        if tokens > self.context:
            raise LlavaError(
                f"{what} does not fit the language model's context",
                expected=f"at most {self.context:,} tokens",
                got=f"{tokens:,}",
                do=do,
            )

    @property
    def layer_types(self) -> list[str]:
        """Kinds of its layers, by transformers' names; full attention if the configuration names none."""
        config = self.model.config.get_text_config()
        return sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))

    @functools.cached_property
    def can_rewind(self) -> bool:
        """Whether its cache can drop the last tokens, as that of attention layers can."""
        takes_cache = "past_key_values" in inspect.signature(self.model.forward).parameters
        return takes_cache and ATTENTION.issuperset(self.layer_types)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for generation.

        With recurrent or convolutional layers it holds a state of everything read, which cannot be rewound
        nor safely be given several more tokens. Raises LlavaError if this transformers has no cache for the
        model that gives the same logits as without one.
        """
        if self.can_rewind:
            return DynamicCache()
        if self._no_cache:
            kinds = ", ".join(self.layer_types)
            raise LlavaError(
                f"cannot generate with a {type(self.model).__name__}",
                expected=f"a cache for {kinds} in transformers {transformers.__version__}",
                got=self._no_cache,
                do="pip install --upgrade transformers, or use a model of attention layers",
            )
        return DynamicCache(config=self.model.config)

    @functools.cached_property
    def _no_cache(self) -> str:
        """Why a model that cannot rewind cannot generate with a cache either; "" if it can."""
        try:
            with torch.inference_mode():
                embedded = self.embed(torch.arange(4, device=self.device)[None])
                whole = self.model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
                cache = DynamicCache(config=self.model.config)
                for part in (embedded[:, :3], embedded[:, 3:]):
                    out = self.model(inputs_embeds=part, past_key_values=cache, use_cache=True)
            return "other logits than without it" if differ(out.logits[:, -1], whole) else ""
        except Exception as error:  # each model rejects a cache in its own way
            return first_line(error)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] -> embeddings [..., hidden], as the model's blocks take them."""
        embedded: torch.Tensor = self.embedding(ids)
        return embedded


def context_of(config: Any) -> int:
    """Context length in tokens by a transformers configuration; very large if it names none."""
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _settings(config: Any) -> JsonDict:
    """The values of SETTINGS that the configuration has."""
    text = config.get_text_config()
    # transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters.
    rope = {**(getattr(text, "rope_scaling", None) or {}), **(getattr(text, "rope_parameters", None) or {})}
    every = {**text.to_dict(), **rope}
    return {key: every[key] for key in SETTINGS if every.get(key) is not None}


def differ(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits differ from `expected` by more than rounding."""
    close = 1e-3 if expected.dtype == torch.float32 else 5e-2
    return not float((logits.float() - expected.float()).norm()) <= close * float(expected.float().norm())
