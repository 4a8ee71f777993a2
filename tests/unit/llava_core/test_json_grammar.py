"""Answers that are JSON: what json.loads reads, and no dead end on the way there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_core.language.json_grammar import CHARACTERS, MOST_BLANKS, NEXT, START, JsonTokens, advance, step
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.token_text import TokenTexts
from tests.support.language_models import byte_tokenizer, write_language_model
from tests.support.small_tokenizers import FAMILIES, small_tokenizer

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


@given(OBJECTS, st.sampled_from([None, 0, 2]), st.booleans())
def test_every_object_may_be_written(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert advance(START, text) == ""
    if "\\ud" not in (escaped := json.dumps(value, ensure_ascii=ascii_only)):  # half a character
        assert advance(START, escaped) == ""


@pytest.mark.parametrize(
    "text",
    [
        "[]", "1", '"a"', " {}", "{} ", "{}}", "{a:1}", "{'a':1}", '{"a" 1}', '{"a":1,}', '{"a":[1,]}',
        '{"a":[,1]}',
        '{"a":01}', '{"a":.5}', '{"a":1.}', '{"a":1e}', '{"a":+1}', '{"a":-}', '{"a":tru}', '{"a":nulll}',
        '{"a":"\n"}', '{"a":"\\x"}', '{"a":"\\u12g4"}', '{"a":"\\ud83d"}', '{"a":1]', '{"a":[1}', "{,}",
        "{" + " " * (MOST_BLANKS + 1) + "}",
    ],
)  # fmt: skip
def test_what_is_no_object_may_not(text: str) -> None:
    assert advance(START, text) != ""


def test_no_state_is_a_dead_end() -> None:
    """From whatever random characters led to, some character goes on."""
    rng, characters = random.Random(0), sorted(CHARACTERS | {" ", "\n", "é"})
    seen = set[str]()
    for _ in range(300):
        state = START
        for _ in range(60):
            following = [new for char in characters if (new := step(state, char)) is not None]
            assert following or not state
            if not following:
                break
            state = rng.choice(following)
            seen.add(state[-1:])
    assert seen >= NEXT.keys() - {"^"}


def tokens_of(tokenizer: Any, vocabulary: int) -> JsonTokens:
    model = SimpleNamespace(tokenizer=tokenizer, head=range(vocabulary), eos_ids={tokenizer.eos_token_id})
    return JsonTokens(cast(LanguageModel, model))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_tokens_that_may_come_are_an_object(family: str) -> None:
    """For each family of tokenizers: the mask is what trying each token gives, and the text is JSON."""
    tokenizer = small_tokenizer(family, "chatml")
    tokens = tokens_of(tokenizer, len(tokenizer) + 3)
    rng = random.Random(0)
    ended = 0
    for _ in range(20):
        state, ids = START, list[int]()
        while state and len(ids) < 60:
            allowed = tokens.allowed(state)
            tried = [bool(text) and advance(state, text) is not None for text in tokens.texts]
            assert allowed.tolist() == tried
            fit = allowed.nonzero()[:, 0].tolist()
            if not fit:
                assert not tokens.complete  # such tokenizers are refused
                break
            ids.append(rng.choice([token for token in fit if tokens.texts[token] in ("}", '"')] or fit))
            state = advance(state, tokens.texts[ids[-1]]) or ""
        if not state:
            ended += 1
            assert isinstance(json.loads(tokenizer.decode(ids)), dict)
    assert ended or not tokens.complete
    assert tokens.complete == family.startswith("byte")  # the others were trained on a few words


def test_control_and_end_tokens_may_never_come(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm"))
    tokens = JsonTokens(llm)
    assert len(tokens.texts) == len(llm.head) > len(llm.tokenizer)
    assert tokens.complete
    inside = tokens.allowed('O"')
    assert not inside[:5].any()
    assert not inside[len(llm.tokenizer) :].any()
    assert isinstance(tokens.allowed(START), torch.Tensor)
    assert [tokens.texts[k] for k in tokens.allowed(START).nonzero()[:, 0]] == ["{"]


def test_the_text_and_the_bytes_of_a_token() -> None:
    texts, tokenizer = TokenTexts(byte_tokenizer()), byte_tokenizer()
    ids = tokenizer(" a红\n", add_special_tokens=False)["input_ids"]
    pairs = [texts.with_bytes(token) for token in ids]
    assert pairs[:2] == [(" ", b" "), ("a", b"a")]
    assert pairs[2][0] == "\ufffd"
    assert b"".join(part or b"" for _, part in pairs).decode() == " a红\n"
    assert texts.with_bytes(tokenizer.eos_token_id) == ("<|im_end|>", b"<|im_end|>")
    spaced = small_tokenizer("sentencepiece always", "chatml")
    (token,) = spaced("red", add_special_tokens=False)["input_ids"]
    assert TokenTexts(spaced).with_bytes(token) == (" red", b" red")
