"""What a sweep varies: lists of values and ranges, from `--space key=...` or a YAML file."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from llava_core.cli.settings import read_settings
from llava_core.errors import LlavaError, nearest
from train.config import RunConfig
from train.flags import FREE_KEYS
from train.sweep.caches import caches_of, require_caches

Value: TypeAlias = "str | int | float"
Point: TypeAlias = "dict[str, Value]"
"""One value for each key that is varied."""

COMMON = {
    *FREE_KEYS,
    *("eval_features", "eval_text", "mix", "llm", "init", "eval_every", "eval_samples"),
    "max_text_tokens",
}
"""Keys that all trials have in common: they read the same data, and are measured alike."""
MOST_SHUFFLED = 100_000
"""Largest grid that --trials shuffles whole; of a larger one it draws from this many first points."""
MOST_TRIALS = 100_000
"""More trials are a slip: no sweep of that size ends."""


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


@dataclasses.dataclass(frozen=True)
class Space:
    """The keys that are varied, each with its values; every point is tried with every seed."""

    axes: Mapping[str, Choices | Range]
    """Values by key, without the seed."""
    seeds: tuple[int, ...]
    """Seeds; empty if the seed is not varied."""

    @staticmethod
    def of(entries: Sequence[str], base: RunConfig) -> Space:
        """The space given after --space. Raises LlavaError (wrong usage) for impossible keys or values."""
        axes = {key: _axis(key, words, base) for key, words in _entries(entries).items()}
        if not axes:
            raise LlavaError("--space", expected="key=value,value or one YAML file", got="none", exit_code=2)
        if "features" in axes:
            require_caches(axes["features"].plain(), "fuse" in axes, base)
        seeds = axes.pop("seed", None)
        if isinstance(seeds, Range):
            ends = range(int(seeds.low), min(int(seeds.high), int(seeds.low) + MOST_TRIALS) + 1)
            seeds = Choices(tuple(ends))
        return Space(axes, tuple(int(seed) for seed in seeds.values) if seeds else ())

    @property
    def keys(self) -> list[str]:
        return [*self.axes, *(["seed"] if self.seeds else [])]

    @property
    def is_grid(self) -> bool:
        """Whether it is finite: made of lists alone."""
        return not any(isinstance(axis, Range) for axis in self.axes.values())

    @property
    def count(self) -> int | None:
        """Number of points, seeds left out; None if there is a range of fractions."""
        sizes = [axis.count for axis in self.axes.values()]
        return None if None in sizes else math.prod(size or 0 for size in sizes)

    def size(self, points: int | None) -> int:
        """Number of trials of `points` points, or of all that there are."""
        if self.count is not None:
            points = min(points or self.count, self.count)
        assert points is not None
        return points * max(1, len(self.seeds))

    def grid(self, points: int | None = None) -> Iterator[Point]:
        """Every point of lists, the first key changing slowest, or `points` of them in a fixed random order;
        seeds change last of all, so that each point is tried once before any is tried again."""
        chosen = _product(self.axes)
        if points is not None:
            drawn = list(itertools.islice(chosen, MOST_SHUFFLED))
            random.Random(0).shuffle(drawn)
            chosen = iter(drawn[:points])
        return self.seeded(list(chosen))

    def seeded(self, points: Sequence[Point]) -> Iterator[Point]:
        """Each of the points with every seed."""
        for seed in self.seeds:
            for point in points:
                yield {**point, "seed": seed}
        if not self.seeds:
            yield from points

    def typical(self) -> Iterator[Point]:
        """Every point of its lists, with the middle of each range."""
        axes = {
            key: axis if isinstance(axis, Choices) else Choices((axis.middle,))
            for key, axis in self.axes.items()
        }
        return _product(axes)

    def suggest(self, trial: Suggests) -> Point:
        """The trial's values; missing ones are drawn."""
        point = {key: axis.suggest(trial, key) for key, axis in self.axes.items()}
        return point | ({"seed": Choices(self.seeds).suggest(trial, "seed")} if self.seeds else {})

    def plain(self) -> dict[str, Any]:
        """The space as YAML has it."""
        lists: dict[str, Any] = {key: axis.plain() for key, axis in self.axes.items()}
        return lists | ({"seed": list(self.seeds)} if self.seeds else {})


def run_config(base: RunConfig, point: Point, out: Path) -> RunConfig:
    """The flags of the run at `point`; its tables of words are found from every working directory."""
    flags: dict[str, Any] = {field.name: getattr(base, field.name) for field in dataclasses.fields(RunConfig)}
    flags |= {"json": False, "resume": False, "dry_run": False, "out": out, **point}
    if "features" in point:
        flags |= caches_of(str(point["features"]), base, flags["fuse"])
    tables = {name: str(Path(flags[name]).absolute()) for name in ("text", "eval_text") if flags[name]}
    return RunConfig(**flags | tables)


def data_configs(base: RunConfig, space: Space) -> list[RunConfig]:
    """The flags of a run on each of the caches that are compared; `base` where all trials have one."""
    axes = {key: space.axes[key] for key in ("features", "fuse") if key in space.axes}
    return [run_config(base, point, base.out) for point in _product(axes)] if axes else [base]


def shown(value: object) -> str:
    """A value, with four digits of a fraction."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def words(point: Mapping[str, object]) -> str:
    """'lr=0.001 projector=mlp'."""
    return " ".join(f"{key}={shown(value)}" for key, value in point.items())


def _product(axes: Mapping[str, Choices | Range]) -> Iterator[Point]:
    lists = [axis.values for axis in axes.values() if isinstance(axis, Choices)]
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*lists))


def _entries(entries: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values as text, from the command line or from one YAML file."""
    if len(entries) == 1 and "=" not in entries[0]:
        return {key: _listed(values) for key, values in read_settings(Path(entries[0])).items()}
    split: dict[str, list[str]] = {}
    for entry in entries:
        name, equals, values = entry.partition("=")
        key = name.strip().lstrip("-").replace("-", "_")
        if not equals or key in split:
            expected = "key=value,value or key=low..high, each key once"
            raise LlavaError("--space", expected=expected, got=entry, exit_code=2)
        split[key] = values.split(",")
    return split


def _listed(values: object) -> list[str]:
    """Words of a YAML value: a list, text as on the command line, or nothing."""
    if values is None:
        return []
    return [str(value) for value in (values if isinstance(values, list) else str(values).split(","))]


def _axis(key: str, given: Sequence[str], base: RunConfig) -> Choices | Range:
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
