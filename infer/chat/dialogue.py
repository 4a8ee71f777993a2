"""A dialogue with a language model, about an image or without one; its KV cache is reused between turns."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator, Sequence

import torch

from infer.chat.transcript import Transcript
from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.detokenize import StreamDetokenizer
from llava_core.language.generate import cached_prefix, generate
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import Sampling


@dataclasses.dataclass
class AnswerFigures:
    """Tokens and seconds of one answer."""

    cached: int = 0
    """Prompt tokens whose keys and values were in the cache, visual ones included."""
    prefilled: int = 0
    """Prompt tokens of the forward pass, visual ones included."""
    tokens: int = 0
    """Tokens of the answer, without its end token."""
    first_s: float = 0.0
    """Seconds from the question to the first token."""
    rest_s: float = 0.0
    """Seconds from the first token to the last, without those that the caller took."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one; 0 for an answer of one token."""
        return (self.tokens - 1) / self.rest_s if self.tokens > 1 else 0.0


class Dialogue:
    """Turns of one dialogue; `begin` starts another one.

    `sampling`, `system` (the system prompt, none if empty) and `thinking` (before each answer) may be changed
    between turns; a `compiled` step decodes the answers' tokens in place of the model.
    """

    def __init__(
        self,
        llm: LanguageModel,
        conversation: Conversation,
        sampling: Sampling,
        *,
        system: str = "",
        thinking: bool = False,
        compiled: CompiledStep | None = None,
    ) -> None:
        self.llm, self.conversation, self.sampling = llm, conversation, sampling
        self.system, self.thinking, self.compiled = system, thinking, compiled
        self.figures = AnswerFigures()
        """Figures of the last answer."""
        self.messages: list[dict[str, str]] = []
        """{"role": "user"|"assistant", "content": text} of every turn."""
        self.visual = torch.empty(1, 0, llm.hidden, dtype=llm.dtype, device=llm.device)
        """Visual tokens [1, T, hidden] before the first turn; T is 0 without an image."""
        self.cache, self.cached = llm.new_cache(), list[int]()
        """Keys and values, and the text tokens among them, which follow the visual ones."""
        self._retries = 0
        self._stream: Generator[str, None, None] | None = None
        """The last answer, which may not have been read to its end."""

    def begin(self, visual: torch.Tensor | None = None, messages: Sequence[dict[str, str]] = ()) -> None:
        """Begin another dialogue, after visual tokens [1, T, hidden] or without an image."""
        self.clear()
        self.visual = self.visual[:, :0] if visual is None else visual
        self._clear_cache()
        self.messages += messages

    def clear(self) -> None:
        """Drop the turns; the image stays, and its keys and values stay in the cache."""
        self._stop_answer()
        self.messages = []
        self._retries = 0

    def set_aside(self) -> None:
        """Free the memory of keys and values; the next question reads the image and all turns again."""
        self._stop_answer()
        self._clear_cache()

    def transcript(self) -> Transcript:
        """The dialogue as it is saved to a file."""
        return Transcript(None, self.messages)

    def load(self, transcript: Transcript) -> None:
        """Continue a saved dialogue. Raises LlavaError for one about an image."""
        if transcript.image is not None:
            raise LlavaError(f"this dialogue is about {transcript.image}", do="go on with it in `infer chat`")
        self.begin(messages=transcript.messages)

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer in pieces of text. If the caller stops early, the dialogue keeps the text so far.

        The next question ends an answer that is still being read. Raises LlavaError, and leaves the dialogue
        as it was, if it no longer fits the model's context.
        """
        self._stop_answer()
        self._retries = 0
        self._stream = self._answer([*self.messages, {"role": "user", "content": question}])
        return self._stream

    def retry(self) -> Generator[str, None, None]:
        """Another answer, of another seed, in place of the last one. Raises LlavaError if there is none."""
        self._stop_answer()
        if not self.messages:
            raise LlavaError("there is no answer yet", do="ask something first")
        self._retries += 1
        self._stream = self._answer(self.messages[:-1])
        return self._stream

    def _stop_answer(self) -> None:
        """End the last answer now: ended later, it would replace the turns after it."""
        if self._stream is not None:
            self._stream.close()

    def _clear_cache(self) -> None:
        self.cache, self.cached = self.llm.new_cache(), []

    def _answer(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        began = first = time.perf_counter()
        system = [{"role": "system", "content": self.system}] if self.system else []
        ids = self.conversation.prompt([*system, *messages], self.thinking)
        detokenizer, consistent = StreamDetokenizer(self.conversation.text, self.sampling.stop), False
        idle = 0.0
        sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + self._retries)
        try:
            embedded = self._new_inputs(ids)
            self.figures = figures = AnswerFigures(self.cache.get_seq_length(), embedded.shape[1])
            self._require_context(len(messages) > 1)
            steps = generate(self.llm, embedded, sampling, self.cache, self.compiled)
            with contextlib.closing(steps):
                for (token,) in steps:
                    assert token is not None
                    now = time.perf_counter() - idle
                    first = first if detokenizer.tokens else now
                    figures.tokens, figures.first_s = figures.tokens + 1, first - began
                    figures.rest_s = now - first
                    if piece := detokenizer.add(token):
                        yield piece
                        idle = time.perf_counter() - now
                    if detokenizer.stopped:
                        break
            consistent = True
            if piece := detokenizer.end():
                yield piece
        except (GeneratorExit, LlavaError):
            consistent = True
            raise
        finally:
            if consistent:
                # The last token was yielded before its own forward pass.
                known = max(0, self.cache.get_seq_length() - self.visual.shape[1])
                self.cached = [*ids, *detokenizer.tokens][:known]
            else:  # interrupted within a forward pass: some layers hold more tokens than others
                self._clear_cache()
            if detokenizer.tokens:
                self.messages = [*messages, {"role": "assistant", "content": detokenizer.text.strip()}]

    def _require_context(self, later: bool) -> None:
        """Raise LlavaError if no token of an answer fits; `later` turns could be dropped to make room."""
        what, do = "the question", "shorten the question" + (" or the system prompt" if self.system else "")
        if later:
            what, do = "the conversation", "begin anew with `clear`"
        self.llm.require_context(what, self.figures.cached + self.figures.prefilled + 1, do)

    def _new_inputs(self, ids: list[int]) -> torch.Tensor:
        """Embeddings of the prompt after the prefix that the cache holds; the cache is cut to that prefix.

        Templates change earlier turns (Qwen3's drops the think block of earlier answers), so the new prompt
        need not continue the old one.
        """
        same = cached_prefix(self.cached, ids)
        if self.cache.get_seq_length() and not self.llm.can_rewind:  # nor can it go on: see `new_cache`
            self._clear_cache()
        if self.cache.get_seq_length() == 0:
            return torch.cat([self.visual, self._embed(ids)], dim=1)
        if surplus := self.cache.get_seq_length() - self.visual.shape[1] - same:
            self.cache.crop(-surplus)  # below zero: how many to drop
        return self._embed(ids[same:])

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self.llm.embed(torch.tensor(ids, dtype=torch.long, device=self.llm.device)[None])
