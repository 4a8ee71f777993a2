"""The flags of a command, read from its dataclass: names, kinds of value, help texts and groups."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import operator
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llava_core.cli.options import GROUPS, Appended, Options

NUMBERS = {int: "N", float: "X"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One field of a command's dataclass."""

    field: str
    kind: Any
    """Its type, without None and what marks a flag that may be repeated."""
    group: str
    default: Any
    required: bool
    appended: bool
    """Whether each occurrence adds a value."""

    @property
    def name(self) -> str:
        """As typed: --max-steps."""
        return "--" + self.field.replace("_", "-")

    @property
    def names(self) -> str:
        """Its name, and for a switch that is on by default the one that turns it off."""
        return f"{self.name}, --no-{self.name[2:]}" if self.kind is bool and self.default else self.name

    @property
    def several(self) -> bool:
        """Whether it takes any number of values."""
        return ... in typing.get_args(self.kind)

    @property
    def count(self) -> int | Literal["*"]:
        """Values that it takes: a number, or * for any."""
        if self.kind is bool or self.appended:
            return 0 if self.kind is bool else 1
        return "*" if self.several else len(typing.get_args(self.kind)) if self.listed else 1

    @property
    def listed(self) -> bool:
        """Whether its value is a tuple."""
        return typing.get_origin(self.kind) is tuple

    @property
    def _item(self) -> Any:
        """Type of each value."""
        return typing.get_args(self.kind)[0] if self.listed else self.kind

    @property
    def value(self) -> str:
        """What stands behind it in a page of help: PATH …, N, {cosine,linear}."""
        if self.kind is bool:
            return ""
        return " ".join([_value(self._item)] * (1 if self.count == "*" else self.count)) + " …" * (
            self.count == "*"
        )

    @property
    def shown_default(self) -> str:
        """Its default as text; nothing for a flag that must be given, and for an empty one."""
        if self.required or self.default is dataclasses.MISSING or self.default in (None, (), ""):
            return ""
        if isinstance(self.default, bool):
            return "on" * self.default
        return " ".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)

    def converted(self, word: str) -> Any:
        """A typed word as a value of this flag. Raises ValueError."""
        return _converted(self._item, word)

    @property
    def expected(self) -> str:
        """Words for the values that it takes."""
        kinds = _kinds(self._item)
        choices = [str(choice) for each in kinds for choice in typing.get_args(each)]
        numbers = [{int: "a whole number", float: "a number"}[each] for each in kinds if each in NUMBERS]
        paths = ["a path"] * (Path in kinds)
        return " or ".join(numbers + paths + ([", ".join(choices)] if choices else []))


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Members of a union, without None; a type alone is its only one."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(each for each in (typing.get_args(kind) if union else (kind,)) if each is not types.NoneType)


def _value(kind: Any) -> str:
    parts = []
    for each in _kinds(kind):
        choices = typing.get_args(each)
        parts.append(
            "{" + ",".join(map(str, choices)) + "}"
            if len(choices) > 1
            else str(choices[0])
            if choices
            else NUMBERS.get(each) or ("PATH" if each is Path else "TEXT")
        )
    return "|".join(parts)


def _converted(kind: Any, word: str) -> Any:
    for each in _kinds(kind):
        if typing.get_origin(each) is Literal:
            if word in typing.get_args(each):
                return word
            continue
        if each is Path and not word:  # a shell's variable that is not set; Path("") would be this folder
            continue
        try:
            return each(word)
        except ValueError:
            continue
    raise ValueError(word)


def flags_of(config: type[Any]) -> tuple[Flag, ...]:
    """Its flags, in the order of the fields."""
    hints = typing.get_type_hints(config, include_extras=True)
    groups = _groups(config)
    flags = []
    for field in dataclasses.fields(config):
        kind, appended = hints[field.name], False
        if typing.get_origin(kind) is typing.Annotated:
            kind, *marks = typing.get_args(kind)
            appended = Appended in marks
        lists = [each for each in _kinds(kind) if typing.get_origin(each) is tuple]
        kinds = _kinds(kind)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        flags.append(
            Flag(
                field=field.name,
                kind=lists[0]
                if lists
                else kinds[0]
                if len(kinds) == 1
                else functools.reduce(operator.or_, kinds),
                group=GROUPS[0] if required else groups.get(field.name, GROUPS[-1]),
                default=field.default,
                required=required,
                appended=appended,
            )
        )
    return tuple(flags)


def _groups(config: type[Options]) -> dict[str, str]:
    """Group of each field that is named in `groups` of the class or its bases, which it may correct."""
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        table: Mapping[str, str] = vars(kind).get("groups", {})
        found |= {name: group for group, names in table.items() for name in names.split()}
    return found


def help_texts(config: type[Options]) -> dict[str, str]:
    """The string below each field, its lines joined, by the field."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if dataclasses.is_dataclass(kind):
            body = _body(kind)
            for field, text in itertools.pairwise(body):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                        texts[field.target.id] = joined(str(text.value.value))
    return texts


def _body(kind: type[Any]) -> Sequence[ast.stmt]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return tree.body


def joined(text: str) -> str:
    """A docstring's paragraph as one line."""
    return " ".join(text.split())


def paragraphs(text: str | None) -> list[str]:
    """A docstring's paragraphs, one line each."""
    return [joined(part) for part in inspect.cleandoc(text or "").split("\n\n") if part.strip()]
