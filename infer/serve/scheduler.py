"""Continuous batching: one thread decodes all running answers together, a token of each at a time.

A question joins between two steps and an answer leaves after its last token, whatever the others do
(iteration-level scheduling of Orca, OSDI 2022). Who waits is served in the order of arrival.
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

from infer.aligned_model import Engine
from infer.serve.kv_cache import SlotCache, longest_context
from infer.serve.request import STOPPING, Job, Piece
from llava_core.cli.console import say_fault
from llava_core.errors import first_line
from llava_core.language.detokenize import Spoken
from llava_core.language.generate import already_read, choose

T = TypeVar("T")
READ_AT_ONCE = 2048
"""Tokens of several prompts that are read in one pass; a single prompt may be longer."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A job that is being answered."""

    job: Job
    spoken: Spoken
    generator: torch.Generator


@dataclasses.dataclass(eq=False)
class Slot:
    """A row of the cache: whom it serves, and what it holds, which stays for a question that continues it."""

    row: int
    answer: Answer | None = None
    key: bytes | None = None
    """Of the picture at its beginning."""
    visual_tokens: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    """Text tokens in the cache, after the picture."""
    used: float = 0.0
    """When (of time.monotonic) it last answered."""

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return self.visual_tokens + len(self.ids)

    def shares(self, job: Job) -> int:
        """Leading tokens that the job need not read again; its last one is always read."""
        if self.key != (job.picture.key if job.picture else None):
            return 0
        return self.visual_tokens + already_read(self.ids, job.ids) if self.held else 0

    def forget(self) -> None:
        self.key, self.visual_tokens, self.ids = None, 0, []


class Batcher:
    """Answers jobs with `slots` sequences at a time; `close` ends the thread and all jobs."""

    def __init__(self, engine: Engine, slots: int, context: int) -> None:
        self.engine, self.llm = engine, engine.llm
        self.context = min(context, longest_context(self.llm.model.config))
        self.cache = SlotCache(slots, self.context)
        self.slots = [Slot(row) for row in range(slots)]
        self.waiting: collections.deque[Job] = collections.deque()
        self._calls: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> int:
        """Slots that answer somebody."""
        return sum(slot.answer is not None for slot in self.slots)

    def submit(self, job: Job) -> None:
        """Queue a job whose prompt and at least one token of an answer fit the context."""
        assert job.prompt_tokens < self.context
        with self._wake:
            if self._closed:
                job.hear(STOPPING)
                return
            self.waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Leave the queue, or free the slot before the next step. An answer that is over stays as it is."""
        job.cancelled = True
        with self._wake, contextlib.suppress(ValueError):
            self.waiting.remove(job)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run something else that needs the device between two steps: one thread computes, and only one."""
        future: Future[T] = Future()
        with self._wake:
            self._calls.append((future, function))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Tell every job that there is no more to come, and wait for the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        for job in [slot.answer.job for slot in self.slots if slot.answer] + list(self.waiting):
            job.hear(STOPPING)
        for future, _ in self._calls:
            future.cancel()

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                self._let_go()
                begun = self._admit()
                if self._closed:
                    return
                if self._calls:
                    _settle(*self._calls.popleft())
                if begun:
                    self._begin(begun)
                if active := [slot for slot in self.slots if slot.answer]:
                    self._step(active)

    def _let_go(self) -> None:
        for slot in self.slots:
            if slot.answer and slot.answer.job.cancelled:
                slot.answer, slot.used = None, time.monotonic()

    def _admit(self) -> list[Slot]:
        """Slots that the next jobs got, if any are free; waits where there is nothing else to do.

        Jobs of which equally many tokens are to be read begin together, as far as READ_AT_ONCE allows:
        reading delays those who are being answered.
        """
        begun: list[Slot] = []
        alike = 0
        with self._wake:
            while not (self._closed or self.waiting or self._calls or self.busy):
                self._wake.wait()
            while self.waiting and (free := [slot for slot in self.slots if slot.answer is None]):
                job = self.waiting[0]
                # The slot that holds most of the prompt already, else the one idle for longest.
                slot = max(free, key=lambda slot: (slot.shares(job), -slot.used))
                new = job.prompt_tokens - slot.shares(job)
                if begun and (new != alike or (len(begun) + 1) * new > READ_AT_ONCE):
                    break
                alike, job.reused = new, slot.shares(job)
                generator = torch.Generator(self.llm.device).manual_seed(job.sampling.seed)
                slot.answer = Answer(job, Spoken(self.engine.text, job.sampling.stop), generator)
                begun.append(slot)
                self.waiting.popleft()
        return begun

    def _begin(self, slots: Sequence[Slot]) -> None:
        """Read the prompts, from where the slots' rows go on with them, and say the first tokens."""
        jobs = [slot.answer.job for slot in slots if slot.answer]
        try:
            logits = self._read(slots, [job.reused for job in jobs], torch.cat([*map(self._unread, jobs)]))
            for slot, job in zip(slots, jobs, strict=True):
                slot.key, slot.visual_tokens = job.picture.key if job.picture else None, job.visual_tokens
                slot.ids = list(job.ids)
            self._say(slots, logits)
        except Exception as error:
            self._fail(slots, _fault(error))

    def _unread(self, job: Job) -> torch.Tensor:
        """Embeddings [1, new, hidden] of the prompt from `reused` on."""
        embedded = self.engine.embed(job.ids)
        if job.picture:
            embedded = torch.cat([job.picture.visual, embedded], dim=1)
        return embedded[:, job.reused :]

    def _step(self, active: Sequence[Slot]) -> None:
        """One token more of every answer."""
        last = [slot.answer.spoken.tokens[-1] for slot in active if slot.answer]
        try:
            embedded = self.llm.embed(torch.tensor(last, device=self.llm.device)[:, None])
            logits = self._read(active, [slot.held for slot in active], embedded)
            for slot, token in zip(active, last, strict=True):
                slot.ids.append(token)
            self._say(active, logits)
        except Exception as error:
            self._fail(active, _fault(error))

    def _read(self, slots: Sequence[Slot], held: Sequence[int], embedded: torch.Tensor) -> torch.Tensor:
        """Inputs [B, new, hidden] after what the slots hold -> logits [B, V] of what follows."""
        reading = self.cache.reading([slot.row for slot in slots], held, embedded.shape[1], embedded)
        logits: torch.Tensor = self.llm.model(inputs_embeds=embedded, logits_to_keep=1, **reading).logits
        return logits[:, -1].float()

    def _say(self, slots: Sequence[Slot], logits: torch.Tensor) -> None:
        """Choose the next token of every answer and tell what it adds."""
        likeliest = logits.argmax(-1).tolist()
        for slot, row, token in zip(slots, logits, likeliest, strict=True):
            answer = slot.answer
            assert answer is not None
            sampling = answer.job.sampling
            if sampling.temperature or sampling.repetition_penalty != 1:
                said = torch.tensor([answer.spoken.tokens], dtype=torch.long, device=logits.device)
                try:
                    token = int(choose(row[None], sampling, [answer.generator], said))
                except RuntimeError as error:  # of this answer alone
                    self._fail([slot], _fault(error))
                    continue
            piece = self._add(answer.job, answer.spoken, token)
            if piece.finish:
                slot.answer, slot.used = None, time.monotonic()
            if piece.finish or piece.text:
                answer.job.hear(piece)

    def _add(self, job: Job, spoken: Spoken, token: int) -> Piece:
        if token in self.llm.eos_ids:
            return Piece(spoken.end(), "stop")
        text = spoken.add(token)
        job.tokens += 1
        if spoken.stopped:
            return Piece(text, "stop")
        if job.tokens == job.sampling.max_tokens or job.prompt_tokens + job.tokens == self.context:
            return Piece(text + spoken.end(), "length")
        return Piece(text)

    def _fail(self, slots: Sequence[Slot], error: str) -> None:
        for slot in slots:
            if slot.answer:
                slot.answer.job.hear(Piece("", error=error))
            slot.answer = None
            slot.forget()


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _fault(error: Exception) -> str:
    """What the client is told; the traceback goes to the log."""
    say_fault(error)
    return f"the model failed: {first_line(error)}"
