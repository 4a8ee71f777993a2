"""Chinese for what the commands print: nothing is left out, and what is filled in stays as it is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llava_core.cli import translation
from llava_core.cli.console import counted, table
from llava_core.cli.translation import CATALOGUE, FIELD, Catalogue, language, read_catalogue
from llava_core.errors import LlavaError
from tests.support.commands import run
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
    assert catalogue.translated(f"error: {error}") == "错误：a; b 缺少 it；需要 一个数; got bricks; 请看 a: b"


@pytest.mark.parametrize(
    ("environment", "words", "line"),
    [
        ({"LANG": "zh_CN.UTF-8"}, (), "错误：python -m train 没有命令 runn；是不是 'run'？"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, ("--lang", "zh"), "错误：python -m train 没有命令"),
        ({"LC_MESSAGES": "zh_TW"}, (), "错误：python -m train 没有命令 runn"),
        ({"LANG": "zh_CN.UTF-8"}, ("--lang=en",), "error: python -m train has no command runn"),
        ({"LANG": "en_GB.UTF-8"}, (), "error: python -m train has no command runn"),
    ],
)
def test_the_locale_or_a_flag_picks_the_language(
    environment: dict[str, str], words: tuple[str, ...], line: str
) -> None:
    variables: dict[str, Any] = {"LC_ALL": "", "LC_MESSAGES": "", "LANG": "", **environment}
    assert run("train", *words, "runn", code=2, **variables).err.startswith(line)


def test_no_english_is_left_in_a_page_of_help_or_a_mistyped_value() -> None:
    assert run("train", "--help", LANG="zh_CN.UTF-8").out.startswith("用缓存的特征训练投影层。\n")
    page = run("train", "run", "--help", LANG="zh_CN.UTF-8").out
    assert "优化器每步的样本数。（默认：16）" in page
    words = ("--features", "a", "--eval-features", "a", "--llm", "b", "--out", "c", "--space", "lr=1")
    ended = run("train", "sweep", *words, "--together", "x", code=2, LANG="zh_CN.UTF-8")
    assert ended.err.strip() == "错误：--together；应为：整数，或 auto；实际为：x"
    ended = run("train", "run", "--recipe", "none", code=2, LANG="zh_CN.UTF-8")
    assert ended.err.strip() == "错误：未知的 --recipe 'none'；应为：course, fast, course-stage2, stage2"


def test_figures_are_named_in_chinese_and_json_stays_english(chinese: None) -> None:
    assert table([("answer tokens", 3), ("grounding gap", 4), ("a b", 5)]).split("\n") == [
        "回答的 token   3",
        "grounding gap  4",
        "a b            5",
    ]
    assert table([("rows", 1)], ("rows", "share")).split("\n")[0] == "行    占比"
    assert (counted(1, "image"), counted(2000, "row")) == ("1 张图片", "2,000 行")
    assert language({"LANG": "en_GB.UTF-8"}) == "zh"


def test_what_is_filled_in_stays_as_it_is(chinese: None) -> None:
    """A message within a message is translated, a path or a caption that reads like one is not."""
    assert (
        translation.translated("no such message, and rows of a thing")
        == "no such message, and rows of a thing"
    )
    assert translation.translated_error("error: no feature folder rows of a; b") == (
        "错误：特征文件夹 rows of a 不存在; b"
    )
