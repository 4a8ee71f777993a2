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

LANGUAGES = ("en", "zh")
CATALOGUE = Path(__file__).with_name("zh.po")
FIELD = re.compile(r"\{(\w+)(?::[^{}]*)?\}")
NESTED = "error"
"""Name of a field that holds a message in its turn."""
FEW = 6
"""Letters of a message below which its fields hold no sentence: `{path} is {what}` fits many."""
GIVEN = ("expected {error}", "got {error}")
"""Parts of an error that hold what was typed, or a message."""
MARKS = {"; ": "；", ": ": "："}
"""What parts an error, in English and in Chinese."""
NUMBER = r"\d[\d,]*"
SENTENCE = re.compile("[A-Za-z]+ [A-Za-z]")
CODE = re.compile("`[^`]*`")
_chosen: list[str] = []


def choose_language(language: str) -> None:
    """Print in this language from now on; auto is the locale's."""
    _chosen[:] = [] if language == "auto" else [language]


def language(environment: Mapping[str, str] = os.environ) -> str:
    """The language chosen, or else the locale's: zh for Chinese, en for any other."""
    if _chosen:
        return _chosen[0]
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    locale = next((value for name in names if (value := environment.get(name))), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def translated(text: str) -> str:
    """`text` in the language chosen; white space around it stays."""
    return _around(text, lambda core: _catalogue().translated(core) or core)


def in_both(text: str) -> tuple[str, str]:
    """`text` in English and in Chinese, for a page that its reader switches."""
    return text, _catalogue().translated(text) or text


def translated_error(text: str) -> str:
    """The text of an error: parts that are joined by semicolons or colons are translated one by one."""
    return _around(text, lambda core: _catalogue().translated_parts(core))


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

    def translated(self, text: str) -> str | None:
        """Its translation, or None."""
        if text in self.entries:
            return self.entries[text]
        for longest, letters, message in self._patterns:
            if text.count("; ") != message.count("; ") and f"{{{NESTED}}}" not in message:
                continue  # parts of an error
            if longest in text and (found := _pattern(message).fullmatch(text)):
                values = found.groupdict()
                if (
                    letters >= FEW
                    or NESTED in values
                    or not any(SENTENCE.search(CODE.sub("", value)) for value in values.values())
                ):
                    return self._filled(message, values)
        return None

    def label(self, text: str) -> str:
        """The name of a figure, its parts looked up one by one."""
        parts = text.split(": ")
        mark = MARKS[": "] if parts[0] in self.entries else ": "
        return mark.join(self.entries.get(part, part) for part in parts)

    def _filled(self, message: str, values: Mapping[str, str]) -> str:
        nested = {NESTED: self._parts(values[NESTED], message in GIVEN)[0]} if NESTED in values else {}
        return FIELD.sub(lambda field: {**values, **nested}[field[1]], self.entries[message])

    def translated_parts(self, text: str) -> str:
        """Its translation; without one, those of its parts between semicolons and behind a colon."""
        return self._parts(text)[0]

    def _parts(self, text: str, known: bool = False) -> tuple[str, bool]:
        """The translation, and whether `text` begins with a message: the mark between two is Chinese, too."""
        if (whole := self.translated(text)) is not None:
            return whole, True
        for mark, chinese in MARKS.items():
            head, found, tail = text.partition(mark)
            if found:
                first, (rest, message) = self.translated(head), self._parts(tail)
                known = known or first is not None or head.startswith("--")
                return f"{first or head}{chinese if known and message else mark}{rest}", known
        return text, False


def _literals(message: str) -> tuple[str, list[str]]:
    """The longest stretch of a message between its fields, and all of them."""
    stretches = FIELD.sub("\0", message).split("\0")
    return max(stretches, key=len), stretches


@functools.cache
def _pattern(message: str) -> re.Pattern[str]:
    """A message as a pattern with a group for each field; one that returns must be the same."""
    seen: set[str] = set()

    def group(name: str) -> str:
        first = name not in seen
        seen.add(name)
        return f"(?P<{name}>{NUMBER if name == 'n' else '.*?'})" if first else f"(?P={name})"

    parts = FIELD.split(message)
    return re.compile(
        "".join(group(part) if at % 2 else re.escape(part) for at, part in enumerate(parts)), re.DOTALL
    )
