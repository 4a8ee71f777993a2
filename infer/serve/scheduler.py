"""Continuous batching: one thread decodes all running answers together, a token of each at a time.

A request joins between two steps and leaves after its last token, whatever the others do (iteration-level
scheduling of Orca, OSDI 2022). Waiting requests are served in the order of arrival.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from infer.answerer import FeatureAnswerer
from infer.serve.decoding import Answer
from infer.serve.kv_cache import GROW_TOKENS, SlotKVCache, longest_context
from infer.serve.request import STOPPING, GenerationRequest, TextDelta
from llava_core.cli.console import say_fault
from llava_core.errors import first_line
from llava_core.language.compiled_decode import LEAST_LENGTH, compiled_forward
from llava_core.language.generate import NOT_FINITE, choose, not_finite
from llava_core.language.sampling import Sampling
from llava_core.language.token_text import TokenTexts

T = TypeVar("T")
NONE = torch.empty(0, 0, dtype=torch.long)
"""No tokens."""
PREFILL_TOKENS = 2048
"""Most tokens of several prompts in one forward pass; a single prompt may be longer."""


@dataclasses.dataclass(eq=False)
class SequenceSlot:
    """A row of the KV cache: its request, and the prefix it holds, which a later request may continue."""

    row: int
    answer: Answer | None = None
    image_key: bytes | None = None
    """sha256 of the image at its beginning."""
    visual_tokens: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    """Text tokens in the cache, after the visual ones."""
    used: float = 0.0
    """Time (of time.monotonic) when its last answer ended."""
    copied: int | None = None
    """Row from which the prefix of its request has to be copied."""

    @property
    def held(self) -> int:
        """Number of tokens in the cache."""
        return self.visual_tokens + len(self.ids)

    def reusable(self, request: GenerationRequest) -> int:
        """Number of leading prompt tokens whose keys and values are in the cache."""
        return request.shared(self.image_key, self.ids) if self.held else 0

    def begin(self, answer: Answer, source: SequenceSlot) -> None:
        """Answer after the prefix that `source`, perhaps this slot itself, holds: the rest is prefilled."""
        request = answer.request
        request.reused = source.reusable(request)
        self.answer, self.copied = answer, None if source is self else source.row
        self._keep(request, request.reused)

    def keep_prompt(self) -> None:
        """Note that the cache now holds the request's prompt."""
        assert self.answer
        self._keep(self.answer.request, self.answer.request.prompt_tokens)

    def _keep(self, request: GenerationRequest, tokens: int) -> None:
        self.image_key, self.visual_tokens = request.image_key, request.visual_tokens if tokens else 0
        self.ids = request.ids[: tokens - self.visual_tokens]

    def free(self) -> None:
        """End the answer; the tokens in the cache stay."""
        self.answer, self.used = None, time.monotonic()

    def clear(self) -> None:
        """End the answer, and drop the tokens in the cache."""
        self.answer, self.image_key, self.visual_tokens, self.ids = None, None, 0, []


class Scheduler:
    """Generates for up to `slots` requests at a time; `close` ends the thread and all requests."""

    def __init__(self, aligned: FeatureAnswerer, slots: int, context: int, compiled: bool = False) -> None:
        self.aligned, self.llm = aligned, aligned.llm
        self.context = min(context, longest_context(self.llm.model.config))
        self.slots = [SequenceSlot(row) for row in range(slots)]
        self._texts = TokenTexts(self.llm.tokenizer)
        self._compiled = compiled_forward(self.llm) if compiled else None
        self.cache = SlotKVCache(slots, self.context, LEAST_LENGTH if compiled else GROW_TOKENS)
        self.waiting: collections.deque[GenerationRequest] = collections.deque()
        self._calls: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        """Slots with a request."""
        return sum(slot.answer is not None for slot in self.slots)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. Its prompt and at least one token of an answer must fit the context."""
        assert request.prompt_tokens < self.context
        with self._wake:
            if self._closed:
                request.emit(STOPPING)
                return
            self.waiting.append(request)
            self._wake.notify()

    def cancel(self, request: GenerationRequest) -> None:
        """Remove a request from the queue, or free its slot before the next step, if it has not ended."""
        request.cancelled = True
        with self._wake, contextlib.suppress(ValueError):
            self.waiting.remove(request)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function between two steps, in the scheduler's thread: only that one uses the device."""
        future: Future[T] = Future()
        with self._wake:
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def warm_up(self) -> None:
        """Compile the step now, so that the first answers need not wait."""
        token = self.llm.embed(torch.zeros(len(self.slots), 1, dtype=torch.long, device=self.llm.device))
        held = [slot.held for slot in self.slots]
        self._forward(self.slots, held, token)  # allocates the cache
        for _ in range(3):  # on a GPU a graph is recorded in the second
            self._forward(self.slots, held, token, self._compiled)

    def close(self) -> None:
        """End the thread, and every request with the error STOPPING."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        for request in [slot.answer.request for slot in self.slots if slot.answer] + list(self.waiting):
            request.emit(STOPPING)
        for future, _ in self._calls:
            future.cancel()

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                self._free_cancelled()
                begun = self._admit()
                if self._closed:
                    return
                if self._calls:
                    _settle(*self._calls.popleft())
                if begun:
                    self._prefill(begun)
                if active := [slot for slot in self.slots if slot.answer]:
                    self._step(active)

    def _free_cancelled(self) -> None:
        for slot in self.slots:
            if slot.answer and slot.answer.request.cancelled:
                slot.free()

    def _admit(self) -> list[SequenceSlot]:
        """Slots of waiting requests that share the next prefill; waits if there is nothing to do at all.

        They have equally many tokens to prefill, up to PREFILL_TOKENS together: a prefill delays the answers
        under way. A request most of whose tokens are in that prefill waits for it, and copies them after it.
        """
        begun: list[SequenceSlot] = []
        each = 0
        with self._wake:
            while not (self._closed or self.waiting or self._calls or self.busy):
                self._wake.wait()
            while self.waiting and (free := [slot for slot in self.slots if slot.answer is None]):
                request = self.waiting[0]
                # The slot that holds most of the prompt already, else the one idle for longest.
                slot = max(free, key=lambda slot: (slot.reusable(request), -slot.used))
                source = max(slot, *self.slots, key=lambda slot: slot.reusable(request))
                new = request.prompt_tokens - source.reusable(request)
                if begun and (new != each or (len(begun) + 1) * new > PREFILL_TOKENS):
                    break
                if any(one.answer and 2 * _saved(one.answer.request, request, new) > new for one in begun):
                    break
                each = new
                slot.begin(Answer(request, self.aligned, self._texts), source)
                begun.append(slot)
                self.waiting.popleft()
        return begun

    def _prefill(self, slots: Sequence[SequenceSlot]) -> None:
        """Run the prompts through the model, after the rows' prefixes, and emit the first tokens."""
        requests = [slot.answer.request for slot in slots if slot.answer]
        try:
            for slot, request in zip(slots, requests, strict=True):
                if slot.copied is not None:
                    self.cache.copy(slot.copied, slot.row, request.reused)
            inputs = torch.cat([self._new_inputs(request) for request in requests])
            logits = self._forward(slots, [request.reused for request in requests], inputs)
            for slot in slots:
                slot.keep_prompt()
            self._emit(slots, logits)
        except Exception as error:
            self._fail(slots, _fault(error))

    def _new_inputs(self, request: GenerationRequest) -> torch.Tensor:
        """Embeddings [1, new, hidden] of the prompt from `reused` on."""
        embedded = self.aligned.embed(request.ids)
        if request.image:
            embedded = torch.cat([request.image.visual, embedded], dim=1)
        return embedded[:, request.reused :]

    def _step(self, active: Sequence[SequenceSlot]) -> None:
        """Generate one more token of every answer.

        The compiled step is for all slots: those that are free write where their next token would go.
        """
        slots = self.slots if self._compiled else active
        last = [slot.answer.last if slot.answer else 0 for slot in slots]
        try:
            embedded = self.llm.embed(torch.tensor(last, device=self.llm.device)[:, None])
            logits = self._forward(slots, [slot.held for slot in slots], embedded, self._compiled)
            if len(active) < len(slots):
                logits = logits[[slot.row for slot in active]]
            for slot in active:
                assert slot.answer
                slot.ids.append(slot.answer.last)
            self._emit(active, logits)
        except Exception as error:
            self._fail(active, _fault(error))

    def _forward(
        self,
        slots: Sequence[SequenceSlot],
        held: Sequence[int],
        embedded: torch.Tensor,
        compiled: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """Inputs [B, new, hidden] after the `held` tokens of each slot -> logits [B, V] of the next token."""
        rows, whole = [slot.row for slot in slots], compiled is not None
        arguments = self.cache.forward_arguments(rows, held, embedded.shape[1], embedded, whole)
        forward = compiled or self.llm.model
        logits: torch.Tensor = forward(inputs_embeds=embedded, logits_to_keep=1, **arguments).logits
        return logits[:, -1].float()

    def _emit(self, slots: Sequence[SequenceSlot], logits: torch.Tensor) -> None:
        """Choose the next token of every answer and emit the text it adds."""
        likeliest: list[int] = choose(logits, Sampling(), (), NONE).tolist()
        for slot, row, token in zip(slots, logits, likeliest, strict=True):
            answer = slot.answer
            assert answer
            if token != NOT_FINITE:
                token = answer.choose(row, token)
            if token == NOT_FINITE:
                self._fail([slot], f"the model failed: {not_finite(self.llm)}")
                continue
            answer.note(token, row)
            delta = answer.add(token, self.context)
            if delta.finish:
                slot.free()
            if delta.finish or delta.text:
                answer.request.emit(delta)

    def _fail(self, slots: Sequence[SequenceSlot], error: str) -> None:
        for slot in slots:
            if slot.answer:
                slot.answer.request.emit(TextDelta("", error=error))
            slot.clear()
            self.cache.clear(slot.row)


def _saved(before: GenerationRequest, request: GenerationRequest, new: int) -> int:
    """How many of the `new` tokens that a request has to prefill it would copy after `before`'s prefill."""
    return request.shared(before.image_key, before.ids) - (request.prompt_tokens - new)


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _fault(error: Exception) -> str:
    """The error for the client; the traceback goes to the log."""
    say_fault(error)
    return f"the model failed: {first_line(error)}"
