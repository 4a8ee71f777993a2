"""Tokens become text: nothing lost, nothing torn, nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_core.language.detokenize import StreamDetokenizer
from tests.support.language_models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def decode(ids: Sequence[int]) -> str:
    text: str = TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def tokens(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def pieces(spoken: StreamDetokenizer, ids: Sequence[int]) -> list[str]:
    return [piece for token in ids if (piece := spoken.add(token))]


def test_a_character_of_several_tokens_comes_whole() -> None:
    spoken = StreamDetokenizer(decode)
    assert pieces(spoken, tokens("a红😀.")) == ["a", "红", "😀", "."]
    assert spoken.end() == ""
    half = StreamDetokenizer(decode)
    assert pieces(half, tokens("红色")[:-1]) == ["红"]
    assert half.text == "红"
    assert half.end() == "\ufffd"


def test_a_stop_text_and_what_follows_is_not_shown() -> None:
    spoken = StreamDetokenizer(decode, ["###", "完了"])
    assert pieces(spoken, tokens("好#的##，完")) == ["好", "#的", "##，"]
    assert not spoken.stopped
    assert pieces(spoken, tokens("了吗###")) == []
    assert spoken.stopped
    assert spoken.end() == ""
    assert spoken.text == "好#的##，"


def test_what_was_held_back_comes_at_the_end() -> None:
    spoken = StreamDetokenizer(decode, ["abc"])
    assert pieces(spoken, tokens("xab")) == ["x"]
    assert spoken.end() == "ab"
    assert spoken.text == "xab"


def test_a_stop_text_within_one_token() -> None:
    words = ["One", " two.", " three"]
    spoken = StreamDetokenizer(lambda ids: "".join(words[i] for i in ids), ["o."])
    assert pieces(spoken, [0, 1, 2]) == ["One", " tw"]
    assert spoken.stopped


def test_spaces_that_a_tokenizer_drops_at_the_beginning_stay_between_words() -> None:
    words = ["▁A", "▁red", "▁ci", "rcle"]
    spoken = StreamDetokenizer(lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "))
    assert pieces(spoken, range(4)) == ["A", " red", " ci", "rcle"]


@given(st.text("ab红😀#", max_size=12), st.lists(st.text("ab红#", min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_the_earliest_stop(text: str, stops: list[str]) -> None:
    spoken = StreamDetokenizer(decode, stops)
    shown = "".join(pieces(spoken, tokens(text))) + spoken.end()
    # Read character by character, as tokens come: a stop counts as soon as it is complete.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first = min(end for end, _ in ends) if ends else len(text)
    assert shown == spoken.text == (text[: min(at for end, at in ends if end == first)] if ends else text)


@given(st.binary(max_size=12))
def test_any_bytes_come_out_as_the_whole_decodes(data: bytes) -> None:
    ids = [5 + byte for byte in data]  # in the order of the alphabet, which is not that of the bytes
    spoken = StreamDetokenizer(decode)
    assert "".join(pieces(spoken, ids)) + spoken.end() == decode(ids)


def test_decoding_takes_no_longer_for_a_long_answer() -> None:
    longest = 0

    def measured(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    pieces(StreamDetokenizer(measured), tokens("红色的圆形，" * 50))
    assert longest <= 12


@pytest.mark.parametrize("special", [0, 2])
def test_special_tokens_say_nothing(special: int) -> None:
    spoken = StreamDetokenizer(decode)
    assert pieces(spoken, [special, *tokens("好"), special]) == ["好"]


def test_text_that_was_there_is_not_released_again() -> None:
    words = ["▁The", "▁sky", "▁is", "▁blue"]
    spoken = StreamDetokenizer(
        lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" "), begun=[0, 1]
    )
    assert pieces(spoken, [2, 3]) == [" is", " blue"]
    assert (spoken.text, spoken.tokens) == (" is blue", [0, 1, 2, 3])
