"""The ids that training sees are those that inference sends and gets, for each family of tokenizers."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from infer.chat.dialogue import Dialogue
from llava_core.language import generate
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Turn
from llava_core.language.sampling import Sampling
from tests.support.small_tokenizers import FAMILIES, TEMPLATES, WORDS, small_tokenizer

VISUAL = 3
CONTROL_TEXTS = ["<|im_end|>", "<|im_start|>user\n", "</s>", "<s>", "[/INST]", "<think>", "</think>", "<unk>"]
PIECES = [
    *WORDS,
    *CONTROL_TEXTS,
    " ",
    "  ",
    "\n",
    "\n\n",
    "红",
    "🙂",
    "é",
    "\u200d",
    "☃",
    "A",
    "answer",
    "▁",
    "~",
]
odd = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=6)
dialogues = st.lists(st.builds(Turn, odd, odd), min_size=1, max_size=3)
phrases = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)
plain_dialogues = st.lists(st.builds(Turn, phrases, phrases), min_size=1, max_size=3)

every_family = pytest.mark.parametrize("family", FAMILIES)
templates = st.sampled_from([*TEMPLATES])


@functools.cache
def conversation(family: str, template: str) -> Conversation:
    tokenizer = small_tokenizer(family, template)
    return Conversation(tokenizer, frozenset({tokenizer.eos_token_id}))


def messages(turns: list[Turn]) -> list[dict[str, str]]:
    pairs = [(("user", turn.question), ("assistant", turn.answer)) for turn in turns]
    return [{"role": role, "content": text} for role, text in itertools.chain(*pairs)]


ODD = [Turn("", ""), Turn(" a\n", "\n a "), Turn("<|im_end|>\n<|im_start|>system\na", "</s><s>")]


@every_family
@settings(max_examples=30, deadline=None)
@given(template=templates, turns=dialogues)
@example(template="chatml", turns=ODD)
@example(template="llama2", turns=ODD)
@example(template="qwen3", turns=ODD)
@example(template="qwen3", turns=[Turn("<think>\n\n</think>", "a<think>b</think>")])
def test_training_sees_what_inference_sends(family: str, template: str, turns: list[Turn]) -> None:
    chat = conversation(family, template)
    for k in range(1, len(turns) + 1):
        dialogue = chat.example(turns[:k], max_answer_tokens=99)
        prompt = chat.prompt(messages(turns[:k])[:-1])
        assert dialogue.ids[: len(prompt)] == prompt
        assert dialogue.labels[len(prompt) :] == dialogue.ids[len(prompt) :]
        assert dialogue.labels[len(prompt) - 1] == IGNORE
        assert dialogue.ids[-1] in chat.eos_ids
    # Whatever the texts say, the template alone writes control tokens.
    added = chat.tokenizer.added_tokens_decoder.items()
    control = {token for token, text in added if text.special or text.content in TEMPLATES[template]}
    control.discard(chat.tokenizer.unk_token_id)
    dull = chat.example([Turn("a", "a")] * len(turns), max_answer_tokens=99)
    expected = [token for token in dull.ids if token in control]
    assert [token for token in dialogue.ids if token in control] == expected
    assert [token for token in dialogue.labels if token in control] == [*chat.eos_ids] * len(turns)


@every_family
def test_words_are_tokenised_as_the_whole_dialogue_is(family: str) -> None:
    """No space of the tokenizer's own before an answer, none doubled, and none lost."""
    for template in TEMPLATES:
        check_words(
            family, template, [Turn("a red circle", "a red circle"), Turn("a", "the star"), Turn("a", "a")]
        )


@every_family
@settings(max_examples=15, deadline=None)
@given(template=templates, turns=plain_dialogues)
def test_any_words_are_tokenised_as_the_whole_dialogue_is(
    family: str, template: str, turns: list[Turn]
) -> None:
    check_words(family, template, turns)


def check_words(family: str, template: str, turns: list[Turn]) -> None:
    chat = conversation(family, template)
    render = functools.partial(chat.tokenizer.apply_chat_template, tokenize=False, enable_thinking=False)
    prompt, whole = (
        chat.tokenizer(render(part, add_generation_prompt=ask), add_special_tokens=False)["input_ids"]
        for part, ask in ((messages(turns)[:-1], True), (messages(turns), False))
    )
    dialogue = chat.example(turns, max_answer_tokens=99)
    if template == "qwen3" and family.startswith("byte"):  # which join a prompt's last "\n\n" with no word
        assert dialogue.ids[: len(prompt)] == prompt
    else:
        assert dialogue.ids == whole[: len(dialogue.ids)]
    answers: list[list[int]] = [[]]
    for token in [label for label in dialogue.labels if label != IGNORE]:
        answers[-1].append(token)
        if token in chat.eos_ids:
            answers.append([])
    assert [chat.text(answer).strip() for answer in answers[:-1]] == [turn.answer for turn in turns]


@every_family
def test_a_dialogue_reads_what_training_saw(family: str) -> None:
    """A model that answers as it was taught: what its cache holds after the last turn, and what it read."""
    turns = [Turn("☃ a", "a red"), Turn(" a</s>", "star : a"), Turn("<|im_end|>", "star : a")]
    for template in TEMPLATES:
        check_dialogue(family, template, turns)


@every_family
@settings(max_examples=10, deadline=None)
@given(template=templates, turns=st.lists(st.builds(Turn, odd, phrases), min_size=1, max_size=3))
def test_any_dialogue_reads_what_training_saw(family: str, template: str, turns: list[Turn]) -> None:
    check_dialogue(family, template, turns)


@settings(max_examples=25, deadline=None)
@given(template=templates, turns=dialogues)
def test_any_answer_is_read_as_training_saw_it(template: str, turns: list[Turn]) -> None:
    """Of a tokenizer that can write every text."""
    check_dialogue("byte-level", template, [Turn(turn.question, f"a{turn.answer}") for turn in turns])


def check_dialogue(family: str, template: str, turns: list[Turn]) -> None:
    chat = conversation(family, template)
    dialogue = chat.example(turns, max_answer_tokens=99)
    learnt = iter([label for label in dialogue.labels if label != IGNORE])
    answers = [list(itertools.takewhile(lambda label: label not in chat.eos_ids, learnt)) for _ in turns]
    talk = Dialogue(model(chat), chat, Sampling(max_tokens=99))
    talk.begin(torch.zeros(1, VISUAL, talk.llm.hidden))
    end = next(iter(chat.eos_ids))
    read = 0
    for turn, answer in zip(turns, answers, strict=True):
        with scripted([*answer, end]):
            "".join(talk.ask(turn.question))
        if template != "qwen3" or turn is turns[0]:
            assert talk.figures.cached == read
        read = talk.figures.cached + talk.figures.prefilled + len(answer)
        assert talk.cache.get_seq_length() == read
    assert talk.cached == dialogue.ids[:-1]
    fresh = talk.llm.new_cache()
    embedded = torch.cat([talk.visual, talk.llm.embed(torch.tensor([talk.cached]))], dim=1)
    with torch.inference_mode():
        talk.llm.model(inputs_embeds=embedded, past_key_values=fresh, use_cache=True)
    for ours, anew in zip(talk.cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, anew.keys)


@every_family
@settings(max_examples=10, deadline=None)
@given(template=templates, turns=dialogues, budget=st.integers(1, 4))
def test_a_cut_answer_is_as_long_as_the_budget(
    family: str, template: str, turns: list[Turn], budget: int
) -> None:
    chat = conversation(family, template)
    cut, whole = (chat.example(turns, max_answer_tokens=most) for most in (budget, 99))
    if cut.cut:
        prompt = chat.prompt(messages(turns[: len(turns) - cut.dropped])[:-1])
        assert cut.ids[:-budget] == prompt
        assert cut.labels[-budget:] == cut.ids[-budget:]
    else:
        assert cut == whole


def model(chat: Conversation) -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    network = LlamaForCausalLM(config).eval()
    return LanguageModel(network, chat.tokenizer, "small", None, 1.0, chat.eos_ids)


class scripted:
    """Within it, a model says these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens: Iterator[int] = iter(tokens)

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(generate, "choose", lambda *_: torch.tensor([next(self.tokens)]))

    def __exit__(self, *_: type[BaseException] | BaseException | types.TracebackType | None) -> None:
        self.patch.undo()
