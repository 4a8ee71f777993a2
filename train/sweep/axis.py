"""The values of one key that a sweep varies: a list, or a range of numbers."""

from __future__ import annotations

import dataclasses
import math
import random
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

from llava_core.errors import LlavaError, nearest
from train.config import RunConfig
from train.flags import FREE_KEYS

Value: TypeAlias = "str | int | float"

COMMON = {
    *FREE_KEYS,
    *("eval_features", "eval_text", "mix", "llm", "init", "eval_every", "eval_samples"),
    "max_text_tokens",
}
"""Keys that all trials have in common: they read the same data, and are measured alike."""


class Suggests(Protocol):
    """The part of an Optuna trial that draws values, or gives those that it was made with."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclasses.dataclass(frozen=True)
class Choices:
    """A list of values."""

    values: tuple[Value, ...]

    def suggest(self, trial: Suggests, key: str) -> Value:
        value: Value = trial.suggest_categorical(key, self.values)
        return value

    @property
    def count(self) -> int:
        return len(self.values)

    def pick(self, draws: random.Random) -> Value:
        return draws.choice(self.values)

    def plain(self) -> list[Value]:
        return list(self.values)


@dataclasses.dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, whole ones if these are."""

    low: int | float
    high: int | float
    log: bool

    @property
    def middle(self) -> Value:
        """Middle of the range, by ratio if it is logarithmic."""
        value = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(value) if isinstance(self.low, int) else value

    def suggest(self, trial: Suggests, key: str) -> Value:
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, log=self.log)
        return trial.suggest_float(key, self.low, self.high, log=self.log)

    @property
    def count(self) -> int | None:
        """Number of whole numbers in it; None if it has fractions."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return int(self.high) - int(self.low) + 1 if whole else None

    def pick(self, draws: random.Random) -> Value:
        """A whole number, uniformly."""
        return draws.randint(int(self.low), int(self.high))

    def plain(self) -> str:
        return f"{self.low!r}..{self.high!r}" + (":log" if self.log else "")


def axis_of(key: str, given: Sequence[str], base: RunConfig) -> Choices | Range:
    """The values given for a key. Raises LlavaError (wrong usage) for an impossible key or value."""
    known = [field.name for field in dataclasses.fields(RunConfig) if field.name not in COMMON]
    if key in COMMON:
        raise LlavaError(
            f"--space cannot vary {key}: all trials have it in common",
            expected=f"one of {', '.join(known)}",
            exit_code=2,
        )
    if key not in known:
        raise LlavaError(f"unknown key {key!r} in --space", do=nearest(key, known), exit_code=2)
    kind = typing.get_type_hints(RunConfig)[key]
    given = [word.strip() for word in given]
    if not given:
        raise LlavaError(f"--space {key}", expected="values", got="an empty list", exit_code=2)
    if key == "features":
        return Choices(tuple(dict.fromkeys(given)))
    if len(given) == 1 and ".." in given[0]:
        ends, _, scale = given[0].partition(":")
        low, high = (_value(key, word, kind, base) for word in ends.split("..", 1))
        scales = ("", "log") if "..." not in ends else ()  # whose would the third dot be?
        if isinstance(low, str) or isinstance(high, str) or scale not in scales or not low < high:
            raise LlavaError(
                f"--space {key}", expected="low..high or low..high:log", got=given[0], exit_code=2
            )
        if scale and low <= 0:
            raise LlavaError(f"--space {key}", expected="a logarithmic range above 0", got=low, exit_code=2)
        return Range(low, high, scale == "log")
    return Choices(tuple(dict.fromkeys(_value(key, word, kind, base) for word in given)))


def _value(key: str, word: str, kind: Any, base: RunConfig) -> Value:
    """A word as the flag's own type, accepted by the flags' own rules."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    value: Value
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if word not in allowed:
            expected = f"one of {', '.join(allowed)}"
            raise LlavaError(f"--space {key}", expected=expected, got=word or "nothing", exit_code=2)
        value = word
    else:
        try:
            value = kind(word)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise LlavaError(
                f"--space {key}", expected=expected, got=word or "nothing", exit_code=2
            ) from None
    changes: dict[str, Any] = {key: value}
    dataclasses.replace(base, **changes)  # raises for a value that the flag refuses
    return value
