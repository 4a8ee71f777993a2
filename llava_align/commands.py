"""`extract`, `curate`, `train`, `sweep` and `scaling` from Python: the commands, with flags as keywords."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from llava_core.cli.options import Options
from llava_core.errors import LlavaError, nearest
from llava_core.types import JsonDict

Paths: typing.TypeAlias = "str | Path | Sequence[str | Path]"
"""One folder, or several."""
Config = TypeVar("Config", bound=Options)
Summary = TypeVar("Summary")


@dataclasses.dataclass(frozen=True)
class ExtractSummary:
    """Figures of `extract run`."""

    out: Path
    rows: int
    ok: int
    failed: int
    figures: JsonDict
    """All that `extract run --json` prints."""


@dataclasses.dataclass(frozen=True)
class CurateSummary:
    """Figures of `extract curate`."""

    out: Path
    """The row list, for `train(rows=…)`."""
    rows: int
    """Rows with features."""
    kept: int
    figures: JsonDict
    """All that `extract curate --json` prints."""


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """Figures of `train run`."""

    out: Path
    checkpoint: Path
    """Folder for `AlignedModel.load`: `best` if held-out shards were given, else `last`."""
    steps: int
    loss: float | None
    """Held-out loss of `checkpoint` in nats per answer token; None without --eval-features."""
    grounding_gap: float | None
    """Nats by which it rises with another row's image."""
    figures: JsonDict
    """All that `train run --json` prints: held-out figures there are those of the last evaluation."""


@dataclasses.dataclass(frozen=True)
class SweepSummary:
    """Figures of `train sweep`."""

    out: Path
    checkpoint: Path
    """Folder of the best trial's checkpoint."""
    figures: JsonDict
    """All that `train sweep --json` prints."""


@dataclasses.dataclass(frozen=True)
class ScalingSummary(SweepSummary):
    """Figures of `train scaling`."""

    laws: list[JsonDict]
    """Of each combination in `space`: E, A, alpha, what twice the rows bring (doubling) and the losses
    predicted, with the ends of their intervals (E_low, E_high, …); alpha is None where there is no law."""


def extract(data: str | Path, *, out: str | Path, vision: str | Path, **flags: Any) -> ExtractSummary:
    """Encode the images of `data` once into feature shards in `out`; a second call continues.

    Keywords are the flags of `extract run` (`max_failed=0.2`). Unlike the command it does not fail when more
    rows failed than `max_failed`: look at `failed`. Raises LlavaError, TypeError for an unknown keyword, and
    KeyboardInterrupt after what waited was written.
    """
    from extract.config import RunConfig
    from extract.run import run

    config = _config(RunConfig, {"data": data, "out": out, "vision": vision, **flags})
    figures = run(config)
    return ExtractSummary(config.out, figures["rows"], figures["ok"], figures["failed"], figures)


def curate(features: Paths, *, out: str | Path, **flags: Any) -> CurateSummary:
    """List in `out`, a parquet file, which rows of feature shards are worth training on.

    `features` is a folder, or a list of folders of one encoder; other keywords are the flags of `extract
    curate` (`vision="models/clip"`, `html="page.html"`). Raises LlavaError, also if no row is left, and
    TypeError for an unknown keyword.
    """
    from extract.curate.command import run
    from extract.curate.config import CurateConfig

    config = _config(CurateConfig, {"features": features, "out": out, **flags})
    figures = run(config)
    return CurateSummary(config.out, figures["rows"], figures["kept"], figures)


def train(
    features: Paths, *, llm: str | Path, out: str | Path, recipe: str | None = None, **flags: Any
) -> TrainSummary:
    """Train a projector on feature shards; a second call with the same keywords continues where it stopped.

    `features` and `eval_features` are folders, or lists of folders; other keywords are the flags of `train
    run` (`lr=1e-3`, `mix="0.7,0.3"`, `eval_features=…`, `projector="package.module:Class"`).
    Raises LlavaError, TypeError for an unknown keyword, and KeyboardInterrupt after a checkpoint was written.
    """
    from train.config import RunConfig
    from train.recipes import RECIPES
    from train.run import run

    given = {"features": features, "llm": llm, "out": out, **_recipe(RECIPES, recipe), **flags}
    config = _config(RunConfig, given)
    figures = _with_own_seed(run, config)
    checkpoint = config.out / ("best" if config.eval_features else "last")
    kept = checkpoint / "metrics.json"  # gone, if a finished run's checkpoints were deleted
    metrics = json.loads(kept.read_text("utf-8")) if kept.exists() else figures
    return TrainSummary(
        out=config.out,
        checkpoint=checkpoint,
        steps=figures["steps"],
        loss=metrics.get("eval_loss"),
        grounding_gap=metrics.get("eval_grounding_gap"),
        figures=figures,
    )


def sweep(
    features: Paths,
    *,
    space: Mapping[str, Iterable[Any] | str] | str | Path,
    eval_features: Paths,
    llm: str | Path,
    out: str | Path,
    recipe: str | None = None,
    **flags: Any,
) -> SweepSummary:
    """Train many projectors with one load of the language model and the features.

    `space` maps keys to lists of values, or to ranges such as "1e-4..1e-2:log", or is a YAML file of such
    lines. Other keywords are the flags of `train sweep`. Raises as `train` does.
    """
    from train.recipes import RECIPES
    from train.sweep.command import run
    from train.sweep.config import SweepConfig

    paths = {"features": features, "eval_features": eval_features, "llm": llm, "out": out}
    given = {**paths, "space": _space(space), **_recipe(RECIPES, recipe), **flags}
    config = _config(SweepConfig, given)
    figures = _with_own_seed(run, config)
    return SweepSummary(config.out, config.out / "best", figures)


def scaling(
    features: Paths,
    *,
    sizes: Iterable[int] | str,
    eval_features: Paths,
    llm: str | Path,
    out: str | Path,
    space: Mapping[str, Iterable[Any] | str] | str | Path | None = None,
    recipe: str | None = None,
    **flags: Any,
) -> ScalingSummary:
    """Train on random subsets of these `sizes` and fit loss = E + A·N^-alpha to their held-out losses.

    `space` is as for `sweep`: each combination has a law of its own. Other keywords are the flags of `train
    scaling` (`seeds=5`). Raises as `train` does.
    """
    from train.recipes import RECIPES
    from train.sweep.command import run
    from train.sweep.config import ScalingConfig

    if not isinstance(sizes, Iterable):
        raise LlavaError("sizes", expected='a list of numbers, or "500,1k,2k,4k"', got=repr(sizes))
    listed = sizes if isinstance(sizes, str) else ",".join(map(str, sizes))
    paths = {"features": features, "eval_features": eval_features, "llm": llm, "out": out}
    varied = {"sizes": listed, "space": _space(space or {})}
    config = _config(ScalingConfig, {**paths, **varied, **_recipe(RECIPES, recipe), **flags})
    figures = _with_own_seed(run, config)
    return ScalingSummary(config.out, config.out / "best", figures, figures.get("laws", []))


def _with_own_seed(run: Callable[[Config], JsonDict], config: Config) -> JsonDict:
    """The figures of a command; torch's CPU generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        return run(config)


def _space(space: Mapping[str, Iterable[Any] | str] | str | Path) -> tuple[str, ...]:
    """The words after --space."""
    if not isinstance(space, Mapping):
        return (str(space),)
    for key, values in space.items():
        if not isinstance(values, Iterable):
            expected = 'a list of values, or a range such as "1e-4..1e-2:log"'
            raise LlavaError(f"space[{key!r}]", expected=expected, got=repr(values))
    values = {
        key: value if isinstance(value, str) else ",".join(map(str, value)) for key, value in space.items()
    }
    return tuple(f"{key}={value}" for key, value in values.items())


def _recipe(recipes: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    if name is not None and name not in recipes:
        raise LlavaError(f"unknown recipe {name!r}", expected=", ".join(recipes))
    return {} if name is None else recipes[name]


def _config(kind: type[Config], keywords: Mapping[str, Any]) -> Config:
    """The flags as their dataclass, checked as the command checks them."""
    config = kind(**typed(kind, keywords, but=("json", "dry_run")))
    config.require_inputs()
    return config


def typed(kind: type[Any], keywords: Mapping[str, Any], but: Sequence[str] = ()) -> dict[str, Any]:
    """Keywords as values for a dataclass's fields, except some.

    Raises TypeError for an unknown keyword, and LlavaError for a value of another type than its field's.
    """
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.name not in but]
    for name in keywords:
        if name not in known:
            raise TypeError(f"unknown keyword {name!r}; {nearest(name, known)}")
    return {name: _value(name, value, hints[name]) for name, value in keywords.items()}


def _value(name: str, value: Any, hint: Any) -> Any:
    """A value as its field's type; NumPy's and torch's numbers are taken as Python's."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(each for each in kinds if each is not types.NoneType)
    lists = [each for each in kinds if typing.get_origin(each) is tuple]
    one = isinstance(value, (str, Path)) and len(kinds) > 1  # of what may be one or several
    kind = next((each for each in kinds if each not in lists), kinds[0]) if one or not lists else lists[0]
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, Iterable):
            raise LlavaError(name, expected="a list", got=repr(value))
        items = [value] if isinstance(value, (str, Path)) else value
        return tuple(_value(name, item, typing.get_args(kind)[0]) for item in items)
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if kind in (Path, str) and isinstance(value, (str, Path)):
        return kind(value)
    if typing.get_origin(kind) is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise LlavaError(name, expected=f"one of {', '.join(typing.get_args(kind))}", got=value)
    accepted = (float, int) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise LlavaError(name, expected=f"a value of type {kind.__name__}", got=repr(value))
    return kind(value)
