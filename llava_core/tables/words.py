"""The words of rows: captions, several captions of one image, or dialogues, in whatever form they come."""

from __future__ import annotations

import ast
import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_core.cli.console import counted, say_once
from llava_core.errors import LlavaError
from llava_core.row_status import Outcome, Status
from llava_core.shards.dialogue import Dialogue, turns_to_text
from llava_core.tables.conversations import ROLES, UnknownRole, conversation_turns, decoded
from llava_core.tables.shown import shown

CAPTION_KEYS = ("global_caption", "caption", "text", "conversations", "messages")
"""Keys of an object that holds the words, the preferred first; the first one is SA1B-Dense-Caption's."""
STARTS = ("{", "[", '"')
"""First characters of JSON that may hold words."""
SAMPLE = 256
"""Rows by which a column is judged."""
MOST_ENCODED = 3
"""Times that a text may be encoded as JSON."""
UNREAD = "\ufffd"
"""Stands for bytes that are no text."""
Words = str | Dialogue
"""A caption, or a dialogue."""


class WordReader:
    """Reads the values of one column; what they are is decided by a sample of them."""

    def __init__(self, where: str, column: str, sample: Sequence[object], key: str | None = None) -> None:
        """`where` names the source, `key` the caption in values that are objects.

        Raises LlavaError if the sample has values, and none of them has words.
        """
        self.where, self.key = where, key
        values = [value for value in map(_plain, sample) if value not in (None, "", [], {})]
        decoded = [literal(value) for value in values if isinstance(value, str)]
        self.quoted = bool(decoded) and None not in decoded
        """Whether all texts are JSON, so that quotes around one are not its own."""
        objects = sum(isinstance(value, (dict, list)) for value in decoded)
        self.encoded = 0 < len(decoded) <= 2 * objects
        """Whether texts are objects or lists as JSON, so that one that cannot be decoded is damaged."""
        words, outcomes = self.read(sample)
        if values and not any(words):
            self._refuse(column, values, outcomes)

    def read(self, values: Sequence[object]) -> tuple[list[Words | None], dict[int, Outcome]]:
        """The words of each row, None if there are none; and the outcome of rows with an unknown role."""
        words: list[Words | None] = [None] * len(values)
        outcomes = {}
        for row, value in enumerate(values):
            try:
                words[row] = self._read(value)
            except UnknownRole as error:
                outcomes[row] = Outcome(Status.BAD_CAPTION, str(error))
        return words, outcomes

    def _read(self, value: object) -> Words | None:
        try:
            found = self._words(self.decoded(value))
        except RecursionError:
            found = None
        text = _plain(value)
        as_it_is = isinstance(text, str) and not (self.encoded or self.quoted)
        return text or None if found is None and as_it_is else found

    def decoded(self, value: object) -> Any:
        """A value without the JSON around it; None where that is damaged."""
        value = _plain(value)
        for _ in range(MOST_ENCODED):
            if isinstance(value, str) and value.startswith(STARTS[: 3 if self.quoted else 2]):
                value = literal(value.strip())
        return value

    def _words(self, value: object) -> Words | None:
        if isinstance(value, str):
            return value.strip() or None
        if isinstance(value, dict):
            keys = [self.key] if self.key is not None else CAPTION_KEYS
            return self._words(next((value[key] for key in keys if value.get(key) is not None), None))
        if not isinstance(value, list) or not value:
            return None
        if all(_is_pair(item) for item in value):  # how Arrow gives a map
            return self._words(dict(value))
        if all(isinstance(item, dict) for item in value):
            if {"from", "role"} & value[0].keys():
                return conversation_turns(value)
            if "type" in value[0]:
                return "\n".join(_parts(value)) or None
        captions = [self._words(item) for item in value]
        if len(captions) == 1:
            return captions[0]
        blank = [isinstance(item, str) and not item.strip() for item in value]
        texts = [text for text in captions if isinstance(text, str)]
        all_read = texts and len(texts) + sum(blank) == len(value)
        return Dialogue(tuple((None, text) for text in texts)) if all_read else None

    def _refuse(self, column: str, values: Sequence[Any], outcomes: Mapping[int, Outcome]) -> None:
        for row, outcome in outcomes.items():
            expected = f"one of {', '.join(ROLES)}"
            raise LlavaError(f"{self.where}, row {row}: {outcome.reason}", expected=expected)
        value = literal(values[0]) if isinstance(values[0], str) else values[0]
        keys = collections.Counter(key for item in values[:8] for key in _keys(item))
        found = ", ".join(map(str, keys))
        raise LlavaError(
            f"{self.where}: column {column!r} has no readable text",
            expected="text, a list of texts, a dialogue, or an object with one of "
            + (repr(self.key) if self.key is not None else ", ".join(CAPTION_KEYS)),
            got=f"{type(value).__name__} {shown(value)}",
            do=f"give --caption-key one of {found}" if found else "name their column by --text-column",
        )

    def texts_of(self, words: Sequence[Words | None]) -> tuple[list[str | None], bool]:
        """What a shard keeps of each row, and whether these are dialogues: they are once any row is one.

        Prints how many have characters that could not be read.
        """
        if dialogues := any(isinstance(item, Dialogue) for item in words):
            all_of = [Dialogue(((None, item),)) if isinstance(item, str) and item else item for item in words]
            texts = [turns_to_text(d.turns, d.system) if isinstance(d, Dialogue) else None for d in all_of]
        else:
            texts = [item if isinstance(item, str) else None for item in words]
        if unread := sum(UNREAD in text for text in texts if text is not None):
            say_once(f"{self.where}: {counted(unread, 'row')} with text that is not UTF-8, kept as {UNREAD}")
        return texts, dialogues


def _plain(value: object) -> Any:
    """Text without spaces around it, bytes as text; anything else as it is."""
    text = decoded(value)
    return text.strip() if isinstance(text, str) else text


def literal(text: str) -> Any:
    """The value of JSON, or of a Python literal; None if it is neither, or no text, list or object."""
    if not text.startswith(STARTS):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _parts(parts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Texts of content parts: [{type: text, text: …}, {type: image, …}]."""
    for part in parts:
        if part.get("type") == "text" and isinstance(text := part.get("text"), str) and text.strip():
            yield text.strip()


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, str):
        value = literal(value)
    if isinstance(value, list) and value:
        value = dict(value) if all(map(_is_pair, value)) else value[0]
    if isinstance(value, dict):
        yield from value
