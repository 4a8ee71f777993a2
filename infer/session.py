"""A dialogue about at most one image. What the language model has read once stays in its cache."""

from __future__ import annotations

from collections.abc import Generator

import torch
from transformers import DynamicCache

from infer.engine import Engine, not_an_image, read_image
from llava_core.preprocess import ImageError
from llava_core.sampling import Sampling
from llava_core.spoken import Spoken


class Session:
    """Turns of one dialogue; `show` begins another one about a new image."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.visual: torch.Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the turns; the image stays."""
        self.messages: list[dict[str, str]] = []
        self.cache = DynamicCache()
        self.cached: list[int] = []
        self.prefilled = 0
        """Tokens the model had to read for the last question, visual ones included."""

    def show(self, image: str) -> None:
        """Begin a dialogue about the image at a path or URL. Raises LlavaError and then changes nothing."""
        try:
            visual = self.engine.see([read_image(image)])
        except ImageError as error:
            raise not_an_image(image, error) from None
        self.visual = visual
        self.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces as it comes. What has come when the caller stops is what is remembered."""
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.engine.conversation.prompt(messages)
        spoken, whole = Spoken(self.engine.text, self.sampling.stop), False
        try:
            for (token,) in self.engine.generate(self._unread(ids), self.sampling, self.cache):
                assert token is not None
                if piece := spoken.add(token):
                    yield piece
                if spoken.stopped:
                    break
            whole = True
            if piece := spoken.end():
                yield piece
        except GeneratorExit:
            whole = True
            raise
        finally:
            if whole:
                visual = 0 if self.visual is None else self.visual.shape[1]
                # The last token is given out before the model reads it.
                self.cached = [*ids, *spoken.tokens][: max(0, self.cache.get_seq_length() - visual)]
            else:  # torn within a forward pass: some layers have read more than others
                self.cache, self.cached = DynamicCache(), []
            if spoken.tokens:
                self.messages = [*messages, {"role": "assistant", "content": spoken.text.strip()}]

    def _unread(self, ids: list[int]) -> torch.Tensor:
        """Embeddings of what the cache does not hold yet; what it holds beyond the common start is dropped.

        Templates change what they said before (Qwen3's drops the think block of earlier answers), so the
        new prompt need not continue the old one.
        """
        same = 0
        while same < min(len(self.cached), len(ids) - 1) and self.cached[same] == ids[same]:
            same += 1
        visual = self.engine.embed([]) if self.visual is None else self.visual
        if self.cache.get_seq_length() == 0:
            embedded = torch.cat([visual, self.engine.embed(ids)], dim=1)
        else:
            if surplus := self.cache.get_seq_length() - visual.shape[1] - same:
                self.cache.crop(-surplus)  # below zero: how many to drop
            embedded = self.engine.embed(ids[same:])
        self.prefilled = embedded.shape[1]
        return embedded
