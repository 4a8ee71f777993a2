"""A request to the scheduler, and the pieces of text it emits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from llava_core.language.generate import cached_prefix
from llava_core.language.json_grammar import JsonTokens
from llava_core.language.sampling import Sampling

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class RequestImage:
    """Visual tokens [1, T, hidden], and the sha256 of the image file."""

    key: bytes
    visual: torch.Tensor


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token and its log probability, by the model's own logits: before temperature, penalty and grammar."""

    text: str
    bytes: bytes | None
    """None if its tokenizer does not tell them, for half a character."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens in its place, in this order."""


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """Text that an answer gained; the last one has `finish` or `error`."""

    text: str
    finish: Finish | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens since the last delta, if they were asked for; those of end tokens are not among them."""

    def __add__(self, after: TextDelta) -> TextDelta:
        logprobs = self.logprobs + after.logprobs
        return TextDelta(self.text + after.text, after.finish, after.error, logprobs)


STOPPING = TextDelta("", error="the server is stopping")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of all answers to a request."""

    prompt: int
    """Visual tokens, and tokens of the text in the template."""
    completion: int
    cached: int
    """Prompt tokens whose keys and values were in the cache."""


@dataclasses.dataclass(eq=False)
class GenerationRequest:
    """A prompt, its sampling, and where its answer goes."""

    ids: list[int]
    """Token ids of the prompt, without visual tokens."""
    image: RequestImage | None
    sampling: Sampling
    on_delta: Callable[[TextDelta], None]
    """Called from the scheduler's thread; must not block."""
    prefill: str = ""
    """What the answer begins with; its tokens are the last ones of the prompt."""
    prefilled: int = 0
    """Number of these tokens."""
    json: JsonTokens | None = None
    """If given, prefill and answer are one JSON object."""
    top_logprobs: int | None = None
    """Number of alternatives to tell the log probabilities of, for each token; None tells none at all."""
    cancelled: bool = False
    """Whether the client has disconnected; nothing is emitted any more."""
    reused: int = 0
    """Prompt tokens whose keys and values were in the cache."""
    tokens: int = 0
    """Tokens generated so far."""

    def emit(self, delta: TextDelta) -> None:
        if not self.cancelled:
            self.on_delta(delta)

    @property
    def image_key(self) -> bytes | None:
        return self.image.key if self.image else None

    @property
    def visual_tokens(self) -> int:
        return self.image.visual.shape[1] if self.image else 0

    @property
    def prompt_tokens(self) -> int:
        return self.visual_tokens + len(self.ids)

    def shared(self, image_key: bytes | None, ids: Sequence[int]) -> int:
        """Number of leading prompt tokens, without the last one, that are also this image's and these ids."""
        return self.visual_tokens + cached_prefix(ids, self.ids) if image_key == self.image_key else 0
