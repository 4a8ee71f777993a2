"""Chinese for what the commands print: help, log lines, errors and summaries, from the catalogue `zh.po`.

In the code a message is English, mostly an f-string. The catalogue has it with the names of what is filled in
(`wrote {path}`), and a finished text is compared with these patterns. A text that fits none stays English.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from llava_core.errors import LlavaError, told

LANGUAGES = ("en", "zh")
CATALOGUE = Path(__file__).with_name("zh.po")
FIELD = re.compile(r"\{(\w+)(?::[^{}]*)?\}")
NESTED = "error"
"""Name of a field that holds a message in its turn."""
FEW = 6
"""Letters of a message below which its fields hold no sentence: `{path} is {what}` fits many."""
MARKS = {"; ": "；", ": ": "："}
"""What stands between parts of an error, in English and in Chinese."""
NUMBER = r"\d[\d,]*"
SENTENCE = re.compile("[A-Za-z]+ [A-Za-z]")
NOTHING = ("nothing", "none")
CODE = re.compile("`[^`]*`")
CHOSEN = "LLAVA_LANG"
"""Variable of the language chosen, by which the processes that a command starts print in it, too."""


def choose_language(language: str) -> None:
    """Print in this language from now on; auto is the locale's."""
    os.environ.pop(CHOSEN, None)
    if language != "auto":
        os.environ[CHOSEN] = language


def language(environment: Mapping[str, str] = os.environ) -> str:
    """The language chosen, or else the locale's: zh for Chinese, en for any other."""
    names = (CHOSEN, "LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((value for name in names if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def translated(text: str) -> str:
    """`text` in the language chosen; white space around it stays."""
    return _around(text, lambda core: _catalogue().translated(core) or core)


def in_both(text: str) -> tuple[str, str]:
    """`text` in English and in Chinese, for a page that its reader switches."""
    return text, _catalogue().translated(text) or text


def translated_error(error: Exception | str) -> str:
    """The text of an error, its parts translated one by one."""
    if isinstance(error, LlavaError):
        mark = "; " if language() == "en" else MARKS["; "]
        return mark.join(_around(part, _catalogue().translated_part) for part in error.parts)
    return _around(told(error) if isinstance(error, Exception) else error, _catalogue().translated_parts)


def error_line(error: Exception) -> str:
    """What a command prints of an error."""
    return translated("error: {error}").format(error=translated_error(error))


def translated_label(text: str) -> str:
    """The name of a figure: only as the catalogue has it, or as its parts on both sides of a colon."""
    return _around(text, lambda core: _catalogue().label(core))


def _around(text: str, translate: Callable[[str], str]) -> str:
    core = text.strip()
    if language() == "en" or not core:
        return text
    return text.replace(core, translate(core), 1)


@functools.cache
def _catalogue() -> Catalogue:
    return Catalogue(read_catalogue(CATALOGUE.read_text(encoding="utf-8")))


def read_catalogue(content: str) -> dict[str, str]:
    """Message and translation of each entry of a .po file that has one."""
    pairs = re.findall(r'^msgid (".*"(?:\n".*")*)\nmsgstr (".*"(?:\n".*")*)$', content, re.MULTILINE)
    entries = (("".join(map(json.loads, part.split("\n"))) for part in pair) for pair in pairs)
    return {message: text for message, text in entries if message and text}


class Catalogue:
    """Translations by message, and by pattern for those with fields."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self.entries = entries
        patterns = [(*_literals(message), message) for message in entries if FIELD.search(message)]
        patterns.sort(key=lambda each: -sum(map(len, each[1])))  # the most literal text first
        self._patterns = [
            (longest, sum(map(str.isalpha, "".join(stretches))), message)
            for longest, stretches, message in patterns
        ]

    def translated(self, text: str, part: bool = True) -> str | None:
        """Its translation; None without one, and where it can be read in two ways: what is filled in is never
        taken for a message's own words. A text that is no `part` of an error may be all parts of one."""
        if text in self.entries:
            return self.entries[text]
        for longest, letters, message in self._patterns:
            if not part and text.count("; ") != message.count("; ") and f"{{{NESTED}}}" not in message:
                continue
            readings = _readings(message, text) if longest in text else []
            if readings and (letters >= FEW or any(map(_holds_no_sentence, readings))):
                shown = {self._filled(self.entries[message], values) for values in readings}
                return shown.pop() if len(shown) == 1 else None
        return None

    def label(self, text: str) -> str:
        """The name of a figure, its parts looked up one by one."""
        parts = text.split(": ")
        mark = MARKS[": "] if parts[0] in self.entries else ": "
        return mark.join(self.entries.get(part, part) for part in parts)

    def _filled(self, message: str, values: Mapping[str, str]) -> str:
        nested = {NESTED: self._sentence(values[NESTED])} if NESTED in values else {}
        return FIELD.sub(lambda field: {**values, **nested}[field[1]], message)

    def translated_part(self, text: str) -> str:
        """Of one part of an error its translation, or else those of what a colon joins."""
        return self.translated(text) or self._split(text, ": ")

    def translated_parts(self, text: str) -> str:
        """Its translation; without one, those of its parts between semicolons and behind a colon."""
        return self.translated(text, part=False) or self._split(text, "; ", ": ")

    def _split(self, text: str, *marks: str) -> str:
        for mark in marks:
            head, found, tail = text.partition(mark)
            if found:
                return f"{self._sentence(head)}{mark}{self._sentence(tail)}"
        return text

    def _sentence(self, text: str) -> str:
        """Words within a message: a single one may well be filled in."""
        return self.translated_parts(text) if SENTENCE.search(text) or text in NOTHING else text


def _holds_no_sentence(values: Mapping[str, str]) -> bool:
    """Whether what is filled in is words that belong to it, or a message in its turn."""
    return NESTED in values or not any(SENTENCE.search(CODE.sub("", value)) for value in values.values())


def _literals(message: str) -> tuple[str, list[str]]:
    """The longest stretch of a message between its fields, and all of them."""
    stretches = FIELD.sub("\0", message).split("\0")
    return max(stretches, key=len), stretches


@functools.cache
def _split(message: str) -> tuple[list[str], list[str]]:
    """Stretches between the fields of a message, and the names of the fields."""
    parts = FIELD.split(message)
    return parts[::2], parts[1::2]


def _readings(message: str, text: str) -> list[dict[str, str]]:
    """What a text fills into the fields of a message: each as short as it can be, and then as long."""
    (first, *between, last), names = _split(message)
    start, end = len(first), len(text) - len(last)
    if start > end or not text.startswith(first) or not text.endswith(last):
        return []
    left, right, begin, stop = list[str](), list[str](), start, end
    for after, before in zip(between, reversed(between), strict=True):
        at, back = text.find(after, begin, end), text.rfind(before, start, stop)
        if at < 0 or back < 0:
            return []
        left.append(text[begin:at])
        right.append(text[back + len(before) : stop])
        begin, stop = at + len(after), back
    found = ([*left, text[begin:end]], [*right, text[start:stop]][::-1])
    return [
        dict(zip(names, values, strict=True))
        for values in found
        if all(re.fullmatch(NUMBER, value) for name, value in zip(names, values, strict=True) if name == "n")
        and len(set(zip(names, values, strict=True))) == len(set(names))
    ]
