"""The results of a sweep: its table, results.csv and .jsonl, best.yaml, and the checkpoint `best`."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import shlex
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml

from llava_core.bootstrap import interval, redrawn, with_interval
from llava_core.cli.console import counted, human_seconds, table
from llava_core.filesystem import replace_text
from llava_core.projector.checkpoint import point_to
from llava_core.types import JsonDict
from train.config import RunConfig
from train.flags import plain
from train.sweep.record import Record, State
from train.sweep.space import Point, shown

ORDER: tuple[State, ...] = ("finished", "pruned", "running", "interrupted", "failed")
SHOWN = 30
"""Most rows of the table in the terminal."""
REMEMBERED = 4096
"""Trials whose held-out losses stay in memory; those of a longer sweep are read at each table."""
NOT_KEPT = {"out", "json", "resume", "dry_run"}
"""Flags that best.yaml leaves to the command line."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Trials that differ by their seed alone."""

    point: Point
    """Values by key, without the seed."""
    records: list[Record]
    above: JsonDict = dataclasses.field(default_factory=dict)
    """`above_best`, its loss minus the best row's, with its interval. Empty for the best row, and for one
    without held-out losses of the same rows and seeds."""

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
        return self._mean(lambda record: record.summary.get("eval_grounding_gap"))

    @property
    def spread(self) -> float | None:
        """Highest minus lowest loss of those that finished; None for a single one."""
        losses = [record.loss for record in self.finished if record.loss is not None]
        return max(losses) - min(losses) if len(losses) > 1 else None

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.records)

    def cells(self) -> list[str]:
        """Cells of the row under `COLUMNS`."""
        some = [f"{len(self.finished)} of {len(self.records)}", human_seconds(self.seconds)]
        loss = [] if self.loss is None else [decimal(self.loss)]
        state = [] if self.state == "finished" else [self.state]
        above = ("none: " if self.is_tied else "") + with_interval(self.above, "above_best")
        return [" ".join([*loss, *state]), above, decimal(self.spread), decimal(self.gap), *some]

    def _mean(self, figure: Callable[[Record], float | None]) -> float | None:
        chosen = [figure(record) for record in self.records if record.state == self.state]
        known = [value for value in chosen if value is not None]
        return sum(known) / len(known) if known else None


ABOVE = ("above_best", "above_best_low", "above_best_high")
COLUMNS = ("held-out loss", "above the best", "spread", "grounding gap", "finished", "time")


def rows_of(records: Sequence[Record]) -> list[Row]:
    """The best first; those that did not finish last."""
    rows: dict[tuple[tuple[str, object], ...], Row] = {}
    for record in records:
        point = {key: value for key, value in record.point.items() if key != "seed"}
        rows.setdefault(tuple(point.items()), Row(point, [])).records.append(record)
    ranked = sorted(rows.values(), key=_rank)
    return [dataclasses.replace(row, above=above) for row, above in zip(ranked, _above(ranked), strict=True)]


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

    each = less(redrawn(sums))
    drawn = np.random.default_rng(0).integers(seeds, size=each.shape)
    means = np.take_along_axis(each, drawn, 1).mean(1)
    return {"above_best": float(less(sums.sum(0)).mean()), **interval("above_best", means)}


def _held_out(folder: Path) -> HeldOut | None:
    """A trial's held-out losses; None if it kept none."""
    path = folder / "held_out.npz"
    try:
        found = path.stat()
        return _read_held_out(path, found.st_ino, found.st_mtime_ns)
    except (OSError, ValueError, LookupError, zipfile.BadZipFile):
        return None


@functools.lru_cache(maxsize=REMEMBERED)
def _read_held_out(path: Path, inode: int, modified: int) -> HeldOut:
    """The file's contents, read again when it has been replaced: the table is written after every trial."""
    with np.load(path) as file:
        pictures = str(file["pictures"]) if "pictures" in file else ""
        sums = np.stack([file["loss"], file["tokens"]], 1).astype(float)
        return HeldOut(str(file["rows"]), sums, pictures)


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


def text_table(rows: Sequence[Row]) -> str:
    """The table for the terminal."""
    if not rows:
        return ""
    lines = [[*map(shown, row.point.values()), *row.cells()] for row in rows[:SHOWN]]
    more = len(rows) - len(lines)
    return table(lines, [*rows[0].point, *COLUMNS]) + (f"\nand {more} more in results.csv" if more else "")


def write_results(folder: Path, records: Sequence[Record], keys: Sequence[str]) -> None:
    """Write results.csv and results.jsonl, a line for each trial, in the table's order."""
    rows = rows_of(records)
    lines = [_line(record, row.above) for row in rows for record in sorted(row.records, key=_rank_of)]
    text = io.StringIO()
    fixed = list(_line(Record(0, "failed", {}, folder)))
    writer = csv.DictWriter(text, [*fixed[:2], *keys, *fixed[2:]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(folder / "results.csv", text.getvalue())
    replace_text(
        folder / "results.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    )


def write_best(folder: Path, best: Record, run: RunConfig) -> str:
    """Write best.yaml, and the link `best` if its checkpoint is there; returns the command for it."""
    flags = {field.name: getattr(run, field.name) for field in dataclasses.fields(RunConfig)}
    kept = {
        key: plain(value) for key, value in flags.items() if key not in NOT_KEPT and value not in ((), None)
    }
    replace_text(folder / "best.yaml", yaml.safe_dump(kept, allow_unicode=True, sort_keys=False))
    checkpoint = best.folder / "best"
    if checkpoint.exists():
        point_to(folder / "best", checkpoint)
    else:  # deleted, to save space: an earlier one would pass for it
        (folder / "best").unlink(missing_ok=True)
    settings, out = folder / "best.yaml", f"runs/{folder.name}-{best.folder.name}"
    return f"python -m train run -c {shlex.quote(str(settings))} --out {shlex.quote(out)}"


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _rank(row: Row) -> tuple[int, bool, float]:
    """Sort key. A mean without pruned seeds flatters: points whose trials all finished come first."""
    partly = len(row.finished) < len(row.records)
    return ORDER.index(row.state), partly, row.loss if row.loss is not None else 0.0


def _rank_of(record: Record) -> tuple[int, float]:
    return ORDER.index(record.state), record.loss if record.loss is not None else 0.0


def _line(record: Record, above: JsonDict | None = None) -> JsonDict:
    summary = record.summary
    return {
        "trial": record.number,
        "state": record.state,
        **record.point,
        "eval_loss": record.loss,
        **{f"eval_loss_{end}": summary.get(f"eval_loss_{end}") for end in ("low", "high")},
        **{key: (above or {}).get(key) for key in ABOVE},
        "eval_perplexity": summary.get("eval_perplexity"),
        "eval_grounding_gap": summary.get("eval_grounding_gap"),
        "steps": summary.get("steps"),
        "seconds": round(record.seconds, 3),
        "folder": f"trials/{record.folder.name}",
        "error": record.error,
    }
