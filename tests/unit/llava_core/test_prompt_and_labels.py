"""Token lists are spelled out: what the model reads, and what it is taught."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from llava_core.errors import LlavaError
from llava_core.language import chat_template
from llava_core.language.instructions import INSTRUCTIONS, pick_instruction
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Turn
from tests.support.language_models import LLAMA_TEMPLATE, TOOLS_TEMPLATE, byte_tokenizer

START, END, THINK, UNTHINK = 1, 2, 3, 4
NO_THOUGHT: list[str | int] = [THINK, "\n\n", UNTHINK, "\n\n"]


def tokens(*pieces: str | int) -> list[int]:
    """Special token numbers as they are, text byte by byte."""
    tokenizer = byte_tokenizer()
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else tokenizer(piece)["input_ids"]
    return ids


def conversation(template: str | None = None) -> Conversation:
    return Conversation(byte_tokenizer(template) if template else byte_tokenizer(), frozenset({END, 0}))


def labels(*pieces: tuple[list[int], bool]) -> list[int]:
    return [token if learnt else IGNORE for part, learnt in pieces for token in part]


def test_one_turn() -> None:
    example = conversation().example([Turn("看", "红圆")], max_answer_tokens=99)
    before = tokens(START, "user\n看", END, "\n", START, "assistant\n", *NO_THOUGHT)
    answer = tokens("红圆", END)
    assert example.ids == before + answer
    assert example.labels == labels((before, False), (answer, True))
    assert not example.cut


def test_earlier_turns_lose_their_think_block_and_keep_their_labels() -> None:
    turns = [Turn("a?", "one"), Turn("b?", "two"), Turn("c?", "three")]
    example = conversation().example(turns, max_answer_tokens=99)
    parts = [
        (tokens(START, "user\na?", END, "\n", START, "assistant\n"), False),
        (tokens("one", END), True),
        (tokens("\n", START, "user\nb?", END, "\n", START, "assistant\n"), False),
        (tokens("two", END), True),
        (tokens("\n", START, "user\nc?", END, "\n", START, "assistant\n", *NO_THOUGHT), False),
        (tokens("three", END), True),
    ]
    assert example.ids == [token for part, _ in parts for token in part]
    assert example.labels == labels(*parts)


def test_a_caption_that_names_special_tokens_is_text() -> None:
    example = conversation().example([Turn("看", "a<|im_end|>b<think>")], max_answer_tokens=99)
    learnt = [token for token, label in zip(example.ids, example.labels, strict=True) if label != IGNORE]
    assert learnt == [*tokens("a"), *(ord(c) + tokens("a")[0] - ord("a") for c in "<|im_end|>b<think>"), END]


@pytest.mark.parametrize("template", [None, LLAMA_TEMPLATE])
def test_training_reads_what_inference_sends(template: str | None) -> None:
    chat = conversation(template)
    history = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b?"},
    ]
    prompt = chat.prompt(history)
    example = chat.example([Turn("a?", "one"), Turn("b?", "two")], max_answer_tokens=99)
    assert example.ids == prompt + tokens("two", END)


def test_a_cut_answer_teaches_no_end_token() -> None:
    example = conversation().example([Turn("q", "abcdef")], max_answer_tokens=4)
    assert example.cut
    assert example.ids[-4:] == example.labels[-4:] == tokens("abcd")
    assert END not in example.labels


def test_an_answer_of_exactly_the_budget_is_whole() -> None:
    example = conversation().example([Turn("q", "abcd")], max_answer_tokens=4)
    assert not example.cut
    assert example.labels[-5:] == tokens("abcd", END)


def test_a_cut_answer_ends_the_dialogue() -> None:
    turns = [Turn("q", "ab"), Turn("r", "abcdef"), Turn("s", "xy"), Turn("t", "z")]
    example = conversation().example(turns, max_answer_tokens=4)
    parts = [
        (tokens(START, "user\nq", END, "\n", START, "assistant\n"), False),
        (tokens("ab", END), True),
        (tokens("\n", START, "user\nr", END, "\n", START, "assistant\n", *NO_THOUGHT), False),
        (tokens("abcd"), True),
    ]
    assert example.ids == [token for part, _ in parts for token in part]
    assert example.labels == labels(*parts)
    assert (example.cut, example.dropped) == (True, 2)


def test_a_question_that_looks_like_a_mark_is_text() -> None:
    """The answers' places are found by marks of that form."""
    example = conversation().example([Turn("answer-0-of-2", "one"), Turn("b?", "two")], max_answer_tokens=99)
    parts = [
        (tokens(START, "user\nanswer-0-of-2", END, "\n", START, "assistant\n"), False),
        (tokens("one", END), True),
        (tokens("\n", START, "user\nb?", END, "\n", START, "assistant\n", *NO_THOUGHT), False),
        (tokens("two", END), True),
    ]
    assert example.ids == [token for part, _ in parts for token in part]
    assert example.labels == labels(*parts)


def test_the_instruction_depends_on_seed_and_key_alone() -> None:
    picks = [pick_instruction(1, f"0/shard/{row}") for row in range(400)]
    assert picks == [pick_instruction(1, f"0/shard/{row}") for row in range(400)]
    assert set(picks) == set(INSTRUCTIONS)
    assert picks != [pick_instruction(2, f"0/shard/{row}") for row in range(400)]


def test_a_template_that_drops_answers_is_refused() -> None:
    chat = conversation("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(LlavaError, match="drops"):
        chat.example([Turn("q", "a")], max_answer_tokens=9)


def test_a_template_without_an_end_token_is_refused() -> None:
    chat = conversation("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(LlavaError, match="without an end token"):
        chat.example([Turn("q", "a")], max_answer_tokens=9)


def test_a_callers_alarm_still_rings() -> None:
    """Rendering borrows the timer: what was set before goes on, and rings late if it was due meanwhile."""
    chat = conversation()
    rung = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rung.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000, 500)
        chat.prompt([{"role": "user", "content": "看"}])
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < left <= 1000
        assert interval == 500
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        with chat_template.at_most(30):
            assert not rung.wait(0.01)
        assert rung.wait(60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_system_message_comes_first_and_has_no_labels() -> None:
    chat = conversation()
    example = chat.example([Turn("a?", "one"), Turn("b?", "two")], max_answer_tokens=99, system="be brief")
    bare = chat.example([Turn("a?", "one"), Turn("b?", "two")], max_answer_tokens=99)
    before = len(example.ids) - len(bare.ids)
    assert chat.tokenizer.decode(example.ids[:before]) == "<|im_start|>system\nbe brief<|im_end|>\n"
    assert example.ids[before:] == bare.ids
    assert example.labels == [IGNORE] * before + bare.labels
    cut = chat.example([Turn("a?", "one"), Turn("b?", "two")], max_answer_tokens=2, system="be brief")
    assert (cut.ids[:before], cut.dropped) == (example.ids[:before], 1)


def test_calls_of_tools_and_their_results_are_text() -> None:
    chat = conversation(TOOLS_TEMPLATE)
    call = {"function": {"name": "f", "arguments": {"<think>": ["<|im_end|>"]}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "wait", "tool_calls": [call]},
        {"role": "tool", "content": "</think>3"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    chat.require_written(messages)
    ids = chat.prompt(messages)
    assert [token for token in ids if token <= UNTHINK] == [START, END] * 5 + [START, THINK, UNTHINK]
    called = '<tool_call>\n{"name": "f", "arguments": {"<think>": ["<|im_end|>"]}}\n</tool_call>'
    text = chat.tokenizer.decode(ids)
    assert f"assistant\nwait\n{called}<|im_end|>" in text
    assert f"assistant\n\n{called}<|im_end|>" in text
    assert "<tool_response>\n</think>3\n</tool_response>" in text


@pytest.mark.parametrize("template", [None, LLAMA_TEMPLATE])
def test_what_a_template_leaves_out_is_named(template: str | None) -> None:
    chat = conversation(template)
    question = {"role": "user", "content": "a?"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat.require_written([{"role": "system", "content": "a"}, question])
    with pytest.raises(LlavaError, match="leaves out a tool call message"):
        chat.require_written([question, call, question])


def test_the_beginning_of_an_answer_is_as_it_is_written() -> None:
    ids = conversation().prompt([{"role": "user", "content": "a?"}])
    assert conversation().prefill(" It is <|im_end|> ", ids) == [
        (tokens("a")[0] + ord(c) - ord("a")) if c != " " else tokens(" ")[0] for c in " It is <|im_end|> "
    ]
