"""A dialogue with a language model, about an image or without one; its KV cache is reused between turns."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator

import torch

from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.conversation import Conversation
from llava_core.language.detokenize import StreamDetokenizer
from llava_core.language.generate import cached_prefix, generate
from llava_core.language.model import LanguageModel
from llava_core.language.sampling import Sampling


@dataclasses.dataclass
class AnswerFigures:
    """Tokens and seconds of one answer."""

    cached: int = 0
    """Prompt tokens whose keys and values were in the cache, visual ones included."""
    prefilled: int = 0
    """Prompt tokens of the forward pass, visual ones included."""
    tokens: int = 0
    """Tokens of the answer."""
    first_s: float = 0.0
    """Seconds from the question to the first token."""
    rest_s: float = 0.0
    """Seconds from the first token to the last."""

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 for an answer of one."""
        return (self.tokens - 1) / self.rest_s if self.tokens > 1 else 0.0


class Dialogue:
    """Turns of one dialogue; `begin` starts another one about new visual tokens."""

    def __init__(self, llm: LanguageModel, conversation: Conversation, sampling: Sampling) -> None:
        self.llm, self.conversation, self.sampling = llm, conversation, sampling
        self.compiled: CompiledStep | None = None
        """A compiled step for the answers' tokens, if set."""
        self.system = ""
        """System prompt; none if empty."""
        self.thinking = False
        """Whether it thinks before it answers."""
        self.figures = AnswerFigures()
        """Figures of the last answer."""
        self.begin(self.nothing())

    def nothing(self) -> torch.Tensor:
        """The visual tokens of a dialogue without an image, [1, 0, hidden]."""
        return torch.empty(1, 0, self.llm.hidden, dtype=self.llm.dtype, device=self.llm.device)

    def begin(self, visual: torch.Tensor) -> None:
        """Forget everything; from now on the dialogue follows visual tokens [1, T, hidden]."""
        self.visual = visual
        self._forget()
        self.clear()

    def clear(self) -> None:
        """Forget the turns; the image stays, in the cache as well."""
        self.messages: list[dict[str, str]] = []
        self._retries = 0

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces as it comes. What has come when the caller stops is what is remembered.

        Raises LlavaError, and remembers nothing, if the dialogue no longer fits the model's context.
        """
        self._retries = 0
        return self._answer([*self.messages, {"role": "user", "content": question}])

    def retry(self) -> Generator[str, None, None]:
        """Another answer, of another seed, in place of the last one. Raises LlavaError if there is none."""
        if not self.messages:
            raise LlavaError("there is no answer yet", do="ask something first")
        self._retries += 1
        return self._answer(self.messages[:-1])

    def _forget(self) -> None:
        self.cache = self.llm.new_cache()
        self.cached: list[int] = []
        """Text tokens in the cache, after the visual ones."""

    def _answer(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        began = first = time.perf_counter()
        told = [{"role": "system", "content": self.system}] if self.system else []
        ids = self.conversation.prompt([*told, *messages], self.thinking)
        detokenizer, whole = StreamDetokenizer(self.conversation.text, self.sampling.stop), False
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._retries)
        try:
            embedded = self._unread(ids)
            self.figures = figures = AnswerFigures(self.cache.get_seq_length(), embedded.shape[1])
            self._require_context(len(messages) > 1)
            steps = generate(self.llm, embedded, sampling, self.cache, self.compiled)
            with contextlib.closing(steps):
                for (token,) in steps:
                    assert token is not None
                    now = time.perf_counter()
                    first = first if detokenizer.tokens else now
                    figures.tokens, figures.first_s = figures.tokens + 1, first - began
                    figures.rest_s = now - first
                    if piece := detokenizer.add(token):
                        yield piece
                    if detokenizer.stopped:
                        break
            whole = True
            if piece := detokenizer.end():
                yield piece
        except (GeneratorExit, LlavaError):
            whole = True
            raise
        finally:
            if whole:
                # The last token is given out before the model reads it.
                known = max(0, self.cache.get_seq_length() - self.visual.shape[1])
                self.cached = [*ids, *detokenizer.tokens][:known]
            else:  # torn within a forward pass: some layers have read more than others
                self._forget()
            if detokenizer.tokens:
                self.messages = [*messages, {"role": "assistant", "content": detokenizer.text.strip()}]

    def _require_context(self, later: bool) -> None:
        """Raise LlavaError if no token of an answer fits; `later`: there are turns to forget."""
        what, do = "the question", "shorten the question" + (" or the system prompt" if self.system else "")
        if later:
            what, do = "the conversation", "begin anew with `clear`"
        self.llm.require_context(what, self.figures.cached + self.figures.prefilled + 1, do)

    def _unread(self, ids: list[int]) -> torch.Tensor:
        """Embeddings of what the cache does not hold yet; what it holds beyond the common start is dropped.

        Templates change what they said before (Qwen3's drops the think block of earlier answers), so the
        new prompt need not continue the old one.
        """
        same = cached_prefix(self.cached, ids)
        if self.cache.get_seq_length() and not self.llm.can_rewind:  # nor can it go on: see `new_cache`
            self._forget()
        if self.cache.get_seq_length() == 0:
            return torch.cat([self.visual, self._embed(ids)], dim=1)
        if surplus := self.cache.get_seq_length() - self.visual.shape[1] - same:
            self.cache.crop(-surplus)  # below zero: how many to drop
        return self._embed(ids[same:])

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.llm.embed(torch.tensor(ids, dtype=torch.long, device=self.llm.device)[None])
