"""What a sweep varies: lists of values and ranges, from `--space key=...` or a YAML file."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from llava_core.cli.settings import read_settings
from llava_core.errors import LlavaError
from train.config import ALL_ROWS, RunConfig
from train.sweep.axis import Choices, Range, Suggests, Value, axis_of
from train.sweep.caches import caches_of, require_caches
from train.sweep.config import MOST_TRIALS, ScalingConfig

Point: TypeAlias = "dict[str, Value]"
"""One value for each key that is varied."""

MOST_SHUFFLED = 100_000
"""Largest grid that --trials shuffles whole; of a larger one it draws from this many first points."""
CACHE_KEYS = ("features", "fuse")
DATA_KEYS = (*CACHE_KEYS, "text", "rows")


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
        axes = {key: axis_of(key, words, base) for key, words in _entries(entries).items()}
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
    def data_keys(self) -> list[str]:
        """Those that decide which data a trial reads."""
        return [key for key in DATA_KEYS if key in self.axes]

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
    if flags["rows"] != ALL_ROWS:
        tables["rows"] = str(Path(flags["rows"]).absolute())
    trial = RunConfig(**flags | tables)
    if isinstance(base, ScalingConfig) and "max_samples" in point:
        trial = dataclasses.replace(trial, eval_every=base.evaluates_every(trial))
    return trial


def data_configs(base: RunConfig, space: Space) -> list[RunConfig]:
    """The flags of a run on each of the data that are compared; `base` where all trials have the same."""
    axes = {key: space.axes[key] for key in space.data_keys}
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
