"""Continuous batching: in company, every answer is the one it would be alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer.aligned_model import Engine
from infer.chat.image_dialogue import Session
from infer.serve.kv_cache import longest_context
from infer.serve.request import Job, Picture, Piece
from infer.serve.scheduler import Batcher
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from tests.support.aligned import World, write_world

SHORT = Sampling(max_tokens=20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    return world.engine()


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    batcher = Batcher(engine, slots=3, context=1024)
    yield batcher
    batcher.close()


class Asked:
    """A question that was submitted."""

    def __init__(
        self, batcher: Batcher, question: str | list[dict[str, str]], image: Path | None = None,
        sampling: Sampling = SHORT,
    ) -> None:  # fmt: skip
        engine = batcher.engine
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        data = image.read_bytes() if image else b""
        picture = Picture(data, engine.see([data])) if image else None
        self.news: queue.Queue[Piece] = queue.Queue()
        self.job = Job(engine.conversation.prompt(messages), picture, sampling, self.news.put)
        batcher.submit(self.job)

        self.text = ""

    def begun(self) -> Asked:
        """Wait for the first piece."""
        self.text += self.news.get(timeout=60).text
        return self

    def answer(self) -> str:
        while True:
            piece = self.news.get(timeout=60)
            assert piece.error is None, piece.error
            self.text += piece.text
            if piece.finish:
                self.finish = piece.finish
                return self.text


def alone(engine: Engine, question: str, image: Path | None = None, sampling: Sampling = SHORT) -> str:
    session = Session(engine, sampling)
    if image:
        session.show(str(image))
    return "".join(session.ask(question))


def test_answers_in_company_equal_those_alone(engine: Engine, world: World, batcher: Batcher) -> None:
    """Of every length, with and without a picture, more than slots, joining while others are answered."""
    questions = ["看", "图中有什么？" * 9, "What?", "长" * 120, "", "a" * 300, "颜色" * 3]
    cases = [
        (question, image, Sampling(max_tokens=5 + 7 * k))
        for k, question in enumerate(questions)
        for image in (None, world.images[k % 5], world.images[(k + 1) % 5])
    ]
    asked = [Asked(batcher, *case) for case in cases]
    expected = [alone(engine, *case) for case in cases]
    assert [one.answer() for one in asked] == expected
    assert len(set(expected)) > 10
    assert batcher.cache.room == 512  # rows had to grow: the longest prompt has over 360 tokens
    assert batcher.busy == 0


def test_a_dialogue_reads_only_what_is_new(engine: Engine, world: World, batcher: Batcher) -> None:
    session = Session(engine, SHORT)
    session.show(str(world.images[0]))
    for turn, question in enumerate(("一个很长很长很长很长的问题", "短", "再")):
        messages = [*session.messages, {"role": "user", "content": question}]
        other = Asked(batcher, "别人", world.images[1])
        asked = Asked(batcher, messages, world.images[0])
        assert asked.answer().strip() == "".join(session.ask(question)).strip()
        other.answer()
        assert asked.job.prompt_tokens - asked.job.reused == session.figures.prefilled
        assert (asked.job.reused > 0) == (turn > 0)
    same = Asked(batcher, messages, world.images[0])
    another = Asked(batcher, messages, world.images[2])
    same.answer(), another.answer()
    assert (same.job.reused, another.job.reused) == (same.job.prompt_tokens - 1, 0)


def test_who_leaves_frees_the_slot_and_the_place_in_the_queue(engine: Engine, batcher: Batcher) -> None:
    batcher.context = 250
    endless = Sampling(max_tokens=10_000)
    running = [Asked(batcher, f"{n}", sampling=endless).begun() for n in range(3)]
    gone, waiting = Asked(batcher, "走"), Asked(batcher, "等")
    batcher.cancel(gone.job)
    assert list(batcher.waiting) == [waiting.job]
    batcher.cancel(running[1].job)
    assert waiting.answer() == alone(engine, "等")
    assert gone.news.empty()
    text = running[0].answer()
    assert running[0].finish == "length"
    assert running[0].job.prompt_tokens + running[0].job.tokens == 250
    assert text == alone(engine, "0", sampling=Sampling(max_tokens=running[0].job.tokens))


def test_each_request_has_its_own_sampling_and_seed(engine: Engine, batcher: Batcher) -> None:
    def warm(seed: int) -> Sampling:
        return Sampling(max_tokens=20, temperature=1.0, top_k=50, repetition_penalty=1.3, seed=seed)

    asked = [Asked(batcher, "说", sampling=warm(seed)) for seed in (1, 2, 1)]
    greedy = Asked(batcher, "说")
    answers = [one.answer() for one in asked]
    assert answers[0] == answers[2] == alone(engine, "说", sampling=warm(1))
    assert answers[0] != answers[1]
    assert greedy.answer() == alone(engine, "说")
    text = alone(engine, "说")
    stopped = Asked(batcher, "说", sampling=Sampling(max_tokens=20, stop=(text[3:5],)))
    assert stopped.answer() == text[: text.index(text[3:5])]
    assert stopped.finish == "stop"


def test_a_model_that_fails_costs_only_the_answers_of_that_moment(
    engine: Engine, batcher: Batcher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    layer = engine.llm.model.model.layers[1]

    def torn(*_: object, **__: object) -> object:
        raise RuntimeError("out of memory")

    Asked(batcher, "看").answer()
    monkeypatch.setattr(layer, "forward", torn)
    assert Asked(batcher, "看").news.get(timeout=60).error == "the model failed: out of memory"
    monkeypatch.undo()
    after = Asked(batcher, "看")
    assert after.answer() == alone(engine, "看")
    assert after.job.reused == 0  # what a torn pass left is not trusted
    assert "RuntimeError: out of memory" in capfd.readouterr().err


def test_closing_tells_everybody(engine: Engine) -> None:
    batcher = Batcher(engine, slots=1, context=1024)
    running = Asked(batcher, "看", sampling=Sampling(max_tokens=10_000)).begun()
    waiting = Asked(batcher, "看")
    batcher.close()
    late = Asked(batcher, "看")
    for one in (running, waiting, late):
        while (piece := one.news.get(timeout=60)).error is None:
            pass
        assert piece.error == "the server is stopping"


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
