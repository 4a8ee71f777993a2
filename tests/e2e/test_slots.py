"""Continuous batching: in company, every answer is the one it would be alone."""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from infer.answerer import ImageAnswerer
from infer.chat.image_dialogue import ImageDialogue
from infer.serve.kv_cache import longest_context
from infer.serve.request import GenerationRequest, RequestImage, TextDelta
from infer.serve.scheduler import Scheduler, SequenceSlot
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from tests.support.aligned import Folders, write_aligned

SHORT = Sampling(max_tokens=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def aligned(world: Folders) -> ImageAnswerer:
    return world.aligned()


@pytest.fixture
def scheduler(aligned: ImageAnswerer) -> Iterator[Scheduler]:
    scheduler = Scheduler(aligned, slots=3, context=1024)
    yield scheduler
    scheduler.close()


class Asked:
    """A question that was submitted."""

    def __init__(
        self, scheduler: Scheduler, question: str | list[dict[str, str]], image: Path | None = None,
        sampling: Sampling = SHORT,
    ) -> None:  # fmt: skip
        aligned = scheduler.aligned
        assert isinstance(aligned, ImageAnswerer)
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        data = image.read_bytes() if image else b""
        picture = RequestImage(data, aligned.encode_files([data])) if image else None
        self.news: queue.Queue[TextDelta] = queue.Queue()
        self.request = GenerationRequest(
            aligned.conversation.prompt(messages), picture, sampling, self.news.put
        )
        scheduler.submit(self.request)

        self.text = ""

    def begun(self) -> Asked:
        """Wait for the first delta."""
        self.text += self.news.get(timeout=60).text
        return self

    def answer(self) -> str:
        while True:
            delta = self.news.get(timeout=60)
            assert delta.error is None, delta.error
            self.text += delta.text
            if delta.finish:
                self.finish = delta.finish
                return self.text


def alone(
    aligned: ImageAnswerer, question: str, image: Path | None = None, sampling: Sampling = SHORT
) -> str:
    session = ImageDialogue(aligned, sampling)
    if image:
        session.show(str(image))
    return "".join(session.ask(question))


def in_company(world: Folders, scheduler: Scheduler) -> None:
    """Of every length, with and without a picture, more than slots, joining while others are answered."""
    aligned = scheduler.aligned
    assert isinstance(aligned, ImageAnswerer)
    questions = ["看", "图中有什么？" * 9, "What?", "长" * 120, "", "a" * 300, "颜色" * 3]
    cases = [
        (question, image, Sampling(max_tokens=5 + 7 * k))
        for k, question in enumerate(questions)
        for image in (None, world.images[k % 5], world.images[(k + 1) % 5])
    ]
    asked = [Asked(scheduler, *case) for case in cases]
    expected = [alone(aligned, *case) for case in cases]
    assert [one.answer() for one in asked] == expected
    assert len(set(expected)) > 10
    assert scheduler.cache.room == 512  # rows had to grow: the longest prompt has over 360 tokens
    assert scheduler.busy == 0


def test_answers_in_company_equal_those_alone(world: Folders, scheduler: Scheduler) -> None:
    in_company(world, scheduler)


def test_a_compiled_step_gives_the_same_answers_with_a_graph_for_each_room(
    aligned: ImageAnswerer, world: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("infer.serve.scheduler.LEAST_LENGTH", 128)
    before = counters["stats"]["unique_graphs"]
    scheduler = Scheduler(aligned, slots=3, context=1024, compiled=True)
    scheduler.call(scheduler.warm_up).result()
    in_company(world, scheduler)
    scheduler.close()
    assert counters["stats"]["unique_graphs"] - before == 3  # of 128, 256 and 512 tokens
    assert not counters["graph_break"]


def test_a_dialogue_reads_only_what_is_new(
    aligned: ImageAnswerer, world: Folders, scheduler: Scheduler
) -> None:
    session = ImageDialogue(aligned, SHORT)
    session.show(str(world.images[0]))
    for turn, question in enumerate(("一个很长很长很长很长的问题", "短", "再")):
        messages = [*session.messages, {"role": "user", "content": question}]
        other = Asked(scheduler, "别人", world.images[1])
        asked = Asked(scheduler, messages, world.images[0])
        assert asked.answer().strip() == "".join(session.ask(question)).strip()
        other.answer()
        assert asked.request.prompt_tokens - asked.request.reused == session.figures.prefilled
        assert (asked.request.reused > 0) == (turn > 0)
    same = Asked(scheduler, messages, world.images[0])
    another = Asked(scheduler, messages, world.images[2])
    same.answer(), another.answer()
    assert (same.request.reused, another.request.reused) == (same.request.prompt_tokens - 1, 0)


def test_questions_about_one_picture_read_it_once(
    aligned: ImageAnswerer, world: Folders, scheduler: Scheduler
) -> None:
    visual = aligned.encode_files([world.images[0].read_bytes()]).shape[1]
    first = Asked(scheduler, "看", world.images[0], Sampling(max_tokens=10_000)).begun()
    others = [("图中有什么？", 0), ("长" * 30, 1), ("What?", 0)]  # the first one is still being answered
    asked = [Asked(scheduler, question, world.images[image]) for question, image in others]
    answers = [one.answer() for one in asked]
    assert answers == [alone(aligned, question, world.images[image]) for question, image in others]
    assert [one.request.reused > visual for one in asked] == [True, False, True]
    assert asked[1].request.reused == 0
    scheduler.cancel(first.request)
    after = Asked(scheduler, "颜色", world.images[0])
    assert after.answer() == alone(aligned, "颜色", world.images[0])
    assert after.request.reused > visual


def test_questions_that_come_together_read_their_picture_once(
    aligned: ImageAnswerer, world: Folders, scheduler: Scheduler
) -> None:
    questions = ["看", "图中有什么？", "长" * 30]
    with scheduler._wake:  # all arrive before the first is read
        asked = [Asked(scheduler, question, world.images[0]) for question in questions]
    assert [one.answer() for one in asked] == [
        alone(aligned, question, world.images[0]) for question in questions
    ]
    assert [one.request.reused > 0 for one in asked] == [False, True, True]


def test_who_leaves_frees_the_slot_and_the_place_in_the_queue(
    aligned: ImageAnswerer, scheduler: Scheduler
) -> None:
    scheduler.context = 250
    endless = Sampling(max_tokens=10_000)
    running = [Asked(scheduler, f"{n}", sampling=endless).begun() for n in range(3)]
    gone, waiting = Asked(scheduler, "走"), Asked(scheduler, "等")
    scheduler.cancel(gone.request)
    assert list(scheduler.waiting) == [waiting.request]
    scheduler.cancel(running[1].request)
    assert waiting.answer() == alone(aligned, "等")
    assert gone.news.empty()
    text = running[0].answer()
    assert running[0].finish == "length"
    assert running[0].request.prompt_tokens + running[0].request.tokens == 250
    assert text == alone(aligned, "0", sampling=Sampling(max_tokens=running[0].request.tokens))


def test_each_request_has_its_own_sampling_and_seed(aligned: ImageAnswerer, scheduler: Scheduler) -> None:
    def warm(seed: int) -> Sampling:
        return Sampling(max_tokens=20, temperature=1.0, top_k=50, repetition_penalty=1.3, seed=seed)

    asked = [Asked(scheduler, "说", sampling=warm(seed)) for seed in (1, 2, 1)]
    greedy = Asked(scheduler, "说")
    answers = [one.answer() for one in asked]
    assert answers[0] == answers[2] == alone(aligned, "说", sampling=warm(1))
    assert answers[0] != answers[1]
    assert greedy.answer() == alone(aligned, "说")
    text = alone(aligned, "说")
    stopped = Asked(scheduler, "说", sampling=Sampling(max_tokens=20, stop=(text[3:5],)))
    assert stopped.answer() == text[: text.index(text[3:5])]
    assert stopped.finish == "stop"


def test_a_model_that_fails_costs_only_the_answers_of_that_moment(
    aligned: ImageAnswerer,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    layer = aligned.llm.model.model.layers[1]

    def torn(*_: object, **__: object) -> object:
        raise RuntimeError("out of memory")

    Asked(scheduler, "看").answer()
    monkeypatch.setattr(layer, "forward", torn)
    assert Asked(scheduler, "看").news.get(timeout=60).error == "the model failed: out of memory"
    monkeypatch.undo()
    after = Asked(scheduler, "看")
    assert after.answer() == alone(aligned, "看")
    assert after.request.reused == 0  # what a torn pass left is not trusted
    assert "RuntimeError: out of memory" in capfd.readouterr().err


def test_logits_that_are_not_finite_cost_one_answer(
    aligned: ImageAnswerer, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = scheduler._forward

    def torn(slots: Sequence[SequenceSlot], *rest: Any) -> torch.Tensor:
        logits = forward(slots, *rest)
        for slot, row in zip(slots, logits, strict=True):
            if slot.answer and slot.answer.request.sampling.seed == 7:
                row[3] = math.nan
        return logits

    monkeypatch.setattr(scheduler, "_forward", torn)
    torn_ones = [Asked(scheduler, "看", sampling=Sampling(temperature=t, seed=7)) for t in (0.0, 0.5)]
    well = Asked(scheduler, "看")
    for one in torn_ones:
        error = one.news.get(timeout=60).error
        assert error == f"the model failed: the logits of {aligned.llm.id} are not finite"
    assert well.answer() == alone(aligned, "看")


def test_what_is_not_finite_leaves_nothing_behind(
    aligned: ImageAnswerer, world: Folders, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = aligned.llm.model.model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.nan)
    for one in [Asked(scheduler, "长" * 120) for _ in scheduler.slots]:
        assert "are not finite" in (one.news.get(timeout=60).error or "")
    monkeypatch.undo()
    after = ["看", "长" * 120, "说"]  # where the short ones end, the longest goes on
    asked = [Asked(scheduler, question) for question in after]
    assert [one.answer() for one in asked] == [alone(aligned, question) for question in after]


def test_closing_tells_everybody(aligned: ImageAnswerer) -> None:
    scheduler = Scheduler(aligned, slots=1, context=1024)
    running = Asked(scheduler, "看", sampling=Sampling(max_tokens=10_000)).begun()
    waiting = Asked(scheduler, "看")
    scheduler.close()
    late = Asked(scheduler, "看")
    for one in (running, waiting, late):
        while (delta := one.news.get(timeout=60)).error is None:
            pass
        assert delta.error == "the server is stopping"


class Config:
    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


def test_the_longest_context() -> None:
    assert longest_context(Config(max_position_embeddings=100, sliding_window=None)) == 100
    assert longest_context(Config(max_position_embeddings=100, sliding_window=40)) == 40
    mixed = Config(
        max_position_embeddings=100, sliding_window=40, layer_types=["full_attention", "sliding_attention"]
    )
    assert longest_context(mixed) == 40
    full = Config(max_position_embeddings=100, sliding_window=40, layer_types=["full_attention"])
    assert longest_context(full) == 100
    with pytest.raises(LlavaError, match="linear_attention"):
        longest_context(Config(layer_types=["linear_attention", "full_attention"]))
