"""Chinese for what the commands print: nothing is left out, and what is filled in stays as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from llava_core.cli import translation
from llava_core.cli.console import counted, table
from llava_core.cli.translation import CATALOGUE, CHOSEN, FIELD, Catalogue, language, read_catalogue
from llava_core.errors import LlavaError
from tests.support.commands import run
from tests.support.messages import messages
from tests.support.paths import ROOT

ADD = "python -m tests.support.messages adds what is missing to the catalogue, and removes what is no message"


@pytest.fixture(scope="module")
def entries() -> dict[str, str]:
    return read_catalogue(CATALOGUE.read_text(encoding="utf-8"))


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOSEN, "zh")


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


def test_an_output_without_chinese_is_english_and_says_so() -> None:
    for encoding, line in (("ascii", "error: python"), ("gb18030", "错误：python")):
        command = [sys.executable, "-m", "train", "--lang", "zh", "runn"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        shown = subprocess.run(command, env=environment, capture_output=True).stderr.decode(encoding)
        *before, last = shown.splitlines()
        assert last.startswith(line)
        assert [each[:10] for each in before] == ["in English"] * (encoding == "ascii")


def test_figures_are_named_in_chinese_and_json_stays_english(chinese: None) -> None:
    assert table([("answer tokens", 3), ("grounding gap", 4), ("a b", 5)]).split("\n") == [
        "回答的 token   3",
        "grounding gap  4",
        "a b            5",
    ]
    assert table([("rows", 1)], ("rows", "share")).split("\n")[0] == "行    占比"
    assert (counted(1, "image"), counted(2000, "row")) == ("1 张图片", "2,000 行")
    assert language() == "zh"


def test_what_is_filled_in_stays_as_it_is(chinese: None) -> None:
    """A message within a message is translated, a path or a caption that reads like one is not."""
    assert (
        translation.translated("no such message, and rows of a thing")
        == "no such message, and rows of a thing"
    )
    shown = [
        translation.error_line(LlavaError(f"no feature folder {folder}", expected="a number", got=got))
        for folder, got in (("rows of a; loss", "rows"), ("a: rows; got loss", "no such thing"))
    ]
    assert shown == [
        "错误：特征文件夹 rows of a; loss 不存在；应为：一个数；实际为：rows",
        "错误：特征文件夹 a: rows; got loss 不存在；应为：一个数；实际为：no such thing",
    ]
    assert translation.error_line(FileNotFoundError(2, "No such file or directory", "a; loss")).endswith(
        ": a; loss"
    )


def test_a_text_that_can_be_read_in_two_ways_stays_as_it_is(entries: dict[str, str]) -> None:
    """Where a path holds the words between two fields, nobody knows which of them are the message's."""
    catalogue = Catalogue(entries)
    for message in entries:
        names = FIELD.findall(message)
        for stretch in filter(str.strip, FIELD.split(message)[::2]):
            values = {name: "12" if name == "n" else f"a{stretch}b" for name in names}
            shown = catalogue.translated(FIELD.sub(lambda field: values[field[1]], message))  # noqa: B023
            assert shown is None or all(value in shown for value in values.values()), message
