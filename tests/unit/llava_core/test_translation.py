"""Chinese for what the commands print: nothing is left out, and what is filled in stays as it is."""

from __future__ import annotations

import re

import pytest

from llava_core.cli import translation
from llava_core.cli.translation import CATALOGUE, FIELD, Catalogue, read_catalogue
from llava_core.errors import LlavaError
from tests.support.messages import messages

ADD = "python -m tests.support.messages adds what is missing to the catalogue, and removes what is no message"


@pytest.fixture(scope="module")
def entries() -> dict[str, str]:
    return read_catalogue(CATALOGUE.read_text(encoding="utf-8"))


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "_chosen", ["zh"])


def test_every_message_is_translated(entries: dict[str, str]) -> None:
    known = set(messages())
    assert sorted(known - set(entries)) == [], ADD
    assert sorted(set(entries) - known) == [], ADD


def test_translations_have_the_fields_of_their_messages(entries: dict[str, str]) -> None:
    for message, text in entries.items():
        assert set(FIELD.findall(text)) == set(FIELD.findall(message)), message


def test_flags_and_code_stay_as_they_are(entries: dict[str, str]) -> None:
    for message, text in entries.items():
        for code in re.findall(r"`[^`]+`|--[a-z][\w-]+", message):
            assert code in text, message


def test_every_message_finds_its_own_translation(entries: dict[str, str]) -> None:
    """Not that of another one whose pattern fits, too."""
    catalogue = Catalogue(entries)
    for message, text in entries.items():
        filled, expected = (
            FIELD.sub(lambda field: "12" if field[1] == "n" else f"‹{field[1]}›", each)
            for each in (message, text)
        )
        assert catalogue.translated(filled) == expected, message


def test_an_error_is_translated_by_its_parts() -> None:
    catalogue = Catalogue(
        {
            "error: {error}": "错误：{error}",
            "{path} lacks {what}": "{path} 缺少 {what}",
            "expected {error}": "需要 {error}",
            "a number": "一个数",
            "look at {folder}": "请看 {folder}",
        }
    )
    error = LlavaError("a; b lacks it", expected="a number", got="bricks", do="look at a: b")
    assert catalogue.translated(f"error: {error}") == "错误：a; b 缺少 it; 需要 一个数; got bricks; 请看 a: b"
