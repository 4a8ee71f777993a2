"""Rows of a sweep's table: trials that differ by their seed alone, ranked, and compared with the best."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from llava_core.bootstrap import by_picture, interval, redrawn
from llava_core.cli.console import counted
from llava_core.types import JsonDict
from train.run_folder import UNREADABLE
from train.sweep.record import Record, State
from train.sweep.space import Point

ORDER: tuple[State, ...] = ("finished", "pruned", "running", "interrupted", "failed")
REMEMBERED = 4096
"""Trials whose held-out losses stay in memory; those of a longer sweep are read at each table."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Trials that differ by their seed alone."""

    point: Point
    """Values by key, without the seed."""
    records: list[Record]
    above: JsonDict = dataclasses.field(default_factory=dict)
    """`above_best`, its loss minus the best row's, with its interval. Empty for the best row, and for one
    without held-out losses of the same rows and seeds."""

    choice: JsonDict = dataclasses.field(default_factory=dict)
    """`choice_accuracy` and `choice_accuracy_shuffled`, with their intervals. Empty without --choices."""

    @property
    def is_tied(self) -> bool:
        """Whether the held-out rows do not tell it from the best one."""
        return bool(self.above) and self.above["above_best_low"] <= 0 <= self.above["above_best_high"]

    @property
    def finished(self) -> list[Record]:
        return [record for record in self.records if record.state == "finished"]

    @property
    def state(self) -> State:
        """State of the trial that came furthest."""
        return min((record.state for record in self.records), key=ORDER.index)

    @property
    def loss(self) -> float | None:
        """Mean loss of the trials in the row's state."""
        return self._mean(lambda record: record.loss)

    @property
    def gap(self) -> float | None:
        """Mean grounding gap of the same trials."""
        return self.mean("eval_grounding_gap")

    @property
    def operations(self) -> float | None:
        """Mean of the operations of all steps (train.flops)."""
        return self.mean("operations")

    @property
    def spread(self) -> float | None:
        """Highest minus lowest loss of those that finished; None for a single one."""
        losses = [record.loss for record in self.finished if record.loss is not None]
        return max(losses) - min(losses) if len(losses) > 1 else None

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.records)

    def mean(self, name: str) -> float | None:
        """Mean of a figure of the summaries, over the trials in the row's state that have it."""
        return self._mean(lambda record: record.summary.get(name))

    def _mean(self, figure: Callable[[Record], float | None]) -> float | None:
        chosen = [figure(record) for record in self.records if record.state == self.state]
        known = [value for value in chosen if value is not None]
        return sum(known) / len(known) if known else None


def rows_of(records: Sequence[Record]) -> list[Row]:
    """The best first; those that did not finish last."""
    rows: dict[tuple[tuple[str, object], ...], Row] = {}
    for record in records:
        point = {key: value for key, value in record.point.items() if key != "seed"}
        rows.setdefault(tuple(point.items()), Row(point, [])).records.append(record)
    ranked = sorted(rows.values(), key=_rank)
    return [
        dataclasses.replace(row, above=above, choice=_choice(row))
        for row, above in zip(ranked, _above(ranked), strict=True)
    ]


def _above(rows: Sequence[Row]) -> list[JsonDict]:
    """`Row.above` of each row, paired by picture and by seed.

    Seeds are drawn again as pictures are; of a single seed, the interval leaves out what another would do.
    """
    kept = [
        {record.point.get("seed"): held for record in row.finished if (held := _held_out(record.folder))}
        for row in rows
    ]
    above: list[JsonDict] = [{} for _ in rows]
    for k, own in enumerate(kept[1:], 1):
        pairs = [(held, kept[0][seed]) for seed, held in own.items() if seed in kept[0]]
        pairs = [(held, best) for held, best in pairs if held.pairs_with(best) and len(held.sums) > 1]
        if pairs:
            above[k] = _difference(*pairs)
    return above


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out losses of a trial, read once; equal to itself alone."""

    rows: str
    """Identity of the rows."""
    sums: np.ndarray
    """Nats and tokens [pictures, 2]."""
    pictures: str = ""
    """Identity of the pictures and their words, whatever encoded them; earlier versions kept none."""

    def pairs_with(self, other: HeldOut) -> bool:
        """Whether both are of the same rows, or of the same pictures by other encoders."""
        return self.rows == other.rows or (self.pictures != "" and self.pictures == other.pictures)


@functools.lru_cache(maxsize=REMEMBERED)
def _difference(*pairs: tuple[HeldOut, HeldOut]) -> JsonDict:
    """`Row.above` of a row from its losses and those of the best one, a pair for each seed."""
    sums, seeds = np.concatenate([held.sums for pair in pairs for held in pair], 1), len(pairs)

    def less(totals: np.ndarray) -> np.ndarray:
        """Loss of the row less that of the best [..., seeds]."""
        each = totals.reshape(*totals.shape[:-1], seeds, 2, 2)
        losses: np.ndarray = each[..., 0] / each[..., 1]
        return np.asarray(losses[..., 0] - losses[..., 1])

    means = _mean_of_seeds(less(redrawn(sums)))
    above = {"above_best": float(less(sums.sum(0)).mean()), **interval("above_best", means)}
    return above | {"above_best_seeds": seeds}


def _mean_of_seeds(each: np.ndarray) -> np.ndarray:
    """Means [DRAWS] of a figure [DRAWS, seeds], the seeds drawn again in each."""
    drawn = np.random.default_rng(0).integers(each.shape[1], size=each.shape)
    return np.asarray(np.take_along_axis(each, drawn, 1).mean(1))


def _choice(row: Row) -> JsonDict:
    """`Row.choice`, paired by picture as `_above` is."""
    kept = [sums for record in row.finished if (sums := _choices(record.folder)) is not None]
    if not kept or len({sums.shape for sums in kept}) > 1:
        return {}
    sums, figures = np.stack(kept, 1), JsonDict()
    drawn = redrawn(sums.reshape(len(sums), -1)).reshape(-1, *sums.shape[1:]) if len(sums) > 1 else None
    for column, name in enumerate(("choice_accuracy", "choice_accuracy_shuffled")):
        total = sums.sum(0)
        figures[name] = float((total[:, column] / total[:, 2]).mean())
        if drawn is not None:
            figures |= interval(name, _mean_of_seeds(drawn[..., column] / drawn[..., 2]))
    return figures


def _held_out(folder: Path) -> HeldOut | None:
    """A trial's held-out losses; None if it kept none."""
    path = folder / "held_out.npz"
    try:
        return _read_held_out(path, *_version(path))
    except UNREADABLE:
        return None


def _choices(folder: Path) -> np.ndarray | None:
    """Sums of a trial's forced choices [pictures, 3]: right, right beside another picture, all; or None."""
    path = folder / "choices.npz"
    try:
        return _read_choices(path, *_version(path))
    except UNREADABLE:
        return None


def _version(path: Path) -> tuple[int, int]:
    """What differs once the file has been replaced: the table is written after every trial."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@functools.lru_cache(maxsize=REMEMBERED)
def _read_held_out(path: Path, inode: int, modified: int) -> HeldOut:
    with np.load(path) as file:
        pictures = str(file["pictures"]) if "pictures" in file else ""
        sums = np.stack([file["loss"], file["tokens"]], 1).astype(float)
        return HeldOut(str(file["rows"]), sums, pictures)


@functools.lru_cache(maxsize=REMEMBERED)
def _read_choices(path: Path, inode: int, modified: int) -> np.ndarray:
    with np.load(path) as file:
        rows = np.stack([file["right"], file["shuffled"], np.ones(len(file["right"]))], 1)
        return by_picture(rows, np.unique(file["pictures"], return_inverse=True)[1].tolist())


def best_of(rows: Sequence[Row]) -> Record | None:
    """The trial with the lowest loss of the best row; None if none has finished."""
    finished = rows[0].finished if rows else []
    return min(finished, key=lambda record: record.loss or 0.0) if finished else None


def how_sure(rows: Sequence[Row]) -> str:
    """How many points the held-out rows do not tell from the best one; "" if there is nothing to compare."""
    others = [row for row in rows[1:] if row.finished]
    unknown, tied = sum(not row.above for row in others), sum(row.is_tied for row in others)
    if not others:
        return ""
    points = counted(len(others), "other point")
    told = f"of {points}, {tied} cannot be told from the best by these held-out rows"
    return told + (f", and {unknown} kept no losses of the same rows and seeds" if unknown else "")


def _rank(row: Row) -> tuple[int, bool, float]:
    """Sort key. A mean without pruned seeds flatters: points whose trials all finished come first."""
    partly = len(row.finished) < len(row.records)
    return ORDER.index(row.state), partly, row.loss if row.loss is not None else 0.0
