"""What a turn of a dialogue costs, to the token."""

from __future__ import annotations

import itertools

import pytest
import torch

from infer.chat.dialogue import Dialogue
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import Sampling
from tests.support.language_models import LLAMA_TEMPLATE
from tests.support.paths import WORLD_MODELS

MODEL = WORLD_MODELS / "llm"
VISUAL = 9


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    llm = load_language_model(MODEL)
    return Dialogue(llm, Conversation(llm.tokenizer, llm.eos_ids), Sampling(max_tokens=5))


def test_a_turn_reads_its_own_tokens_alone() -> None:
    """With a template that leaves earlier answers as they were."""
    llm = load_language_model(MODEL)
    llm.tokenizer.chat_template = LLAMA_TEMPLATE
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    dialogue = Dialogue(llm, conversation, Sampling(max_tokens=5))
    dialogue.begin(torch.randn(1, VISUAL, llm.hidden, generator=torch.Generator().manual_seed(0)))
    known = 0
    for question in ("描述图中的内容。", "颜色？", "还有什么？"):
        assert "".join(dialogue.ask(question))
        prompt = VISUAL + len(conversation.prompt(dialogue.messages[:-1]))
        assert (dialogue.figures.cached, dialogue.figures.prefilled) == (known, prompt - known)
        # An answer that ended was read to its last token; of one that was cut, the last is read next.
        known = prompt + min(dialogue.figures.tokens, 4)
    "".join(dialogue.retry())
    assert (dialogue.figures.cached, dialogue.figures.prefilled) == (prompt - 1, 1)


def test_a_question_ends_the_answer_before_it(dialogue: Dialogue) -> None:
    """A stream that its caller keeps, and drops later, changes nothing by then."""
    streams = [dialogue.ask("看")]
    begun = next(streams[0])
    streams.append(dialogue.ask("never read"))
    answer = "".join(dialogue.ask("再看")).strip()
    contents = ["看", begun.strip(), "再看", answer]
    assert [message["content"] for message in dialogue.messages] == contents
    cached = list(dialogue.cached)
    assert [list(stream) for stream in streams] == [[], []]
    streams.clear()
    assert [message["content"] for message in dialogue.messages] == contents
    assert dialogue.cached == cached
    assert dialogue.cache.get_seq_length() == len(cached)


@pytest.mark.parametrize("change", ["begin", "clear", "retry"])
def test_what_begins_anew_ends_the_answer_before_it(dialogue: Dialogue, change: str) -> None:
    dialogue.begin()
    stream = dialogue.ask("看")
    next(stream)
    again = list(getattr(dialogue, change)() or ())
    kept = [message["content"] for message in dialogue.messages]
    assert kept == (["看", "".join(again).strip()] if change == "retry" else [])
    del stream
    assert [message["content"] for message in dialogue.messages] == kept
    assert dialogue.cache.get_seq_length() == len(dialogue.cached)
    assert "".join(dialogue.ask("再看"))


def test_what_the_caller_takes_is_not_the_model_s_time(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where two checkpoints answer by turns."""
    clock = itertools.count()
    away = 0
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock) + away))
    dialogue.begin()
    for _ in dialogue.ask("看"):
        away += 1_000_000
    assert dialogue.figures.tokens > 1
    assert 0 < dialogue.figures.rest_s < 1_000
