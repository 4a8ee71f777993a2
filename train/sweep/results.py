"""The results of a sweep: its table, results.csv and .jsonl, best.yaml, and the checkpoint `best`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import yaml

from llava_core.bootstrap import with_interval
from llava_core.cli.console import counted, human_operations, human_seconds, table
from llava_core.cli.translation import translated
from llava_core.filesystem import replace_text
from llava_core.projector.checkpoint import point_to
from llava_core.types import JsonDict
from train.config import RunConfig
from train.flags import plain
from train.sweep.record import Record
from train.sweep.rows import ORDER, Row, rows_of
from train.sweep.space import shown

SHOWN = 30
"""Most rows of the table in the terminal."""
NOT_KEPT = {"out", "json", "resume", "dry_run"}
"""Flags that best.yaml leaves to the command line."""
ABOVE = ("above_best", "above_best_low", "above_best_high", "above_best_seeds")
CHOICE = tuple(f"choice_accuracy{what}{end}" for what in ("", "_shuffled") for end in ("", "_low", "_high"))
COST = ("tokens_per_picture", "trained_parameters", "operations")
Column: TypeAlias = "tuple[str, Callable[[Row], str]]"
"""Its name, and what it says of a row."""


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Columns of the table beside the values: of what a row costs those in which rows differ."""
    choices = next((record.summary["choices"] for row in rows for record in row.finished if row.choice), 0)
    measured: list[Column] = [
        (translated(f"{choices}-way choice"), lambda row: with_interval(row.choice, "choice_accuracy", 3)),
        (translated(f"with shuffled pictures (chance {1 / max(1, choices):.3g})"),
         lambda row: with_interval(row.choice, "choice_accuracy_shuffled", 3)),
    ]  # fmt: skip
    costs: list[Column] = [
        ("tokens per image", lambda row: _whole(row.mean("tokens_per_picture"))),
        ("trained parameters", lambda row: _whole(row.mean("trained_parameters"))),
        ("operations", lambda row: "-" if row.operations is None else human_operations(row.operations)),
    ]
    return [
        ("held-out loss", _loss),
        ("above the best", _above),
        ("spread", lambda row: decimal(row.spread)),
        ("grounding gap", lambda row: decimal(row.gap)),
        *(measured if choices else []),
        *((name, cell) for name, cell in costs if len({cell(row) for row in rows} - {"-"}) > 1),
        ("finished", lambda row: f"{len(row.finished)} of {len(row.records)}"),
        ("time", lambda row: human_seconds(row.seconds)),
    ]


def _loss(row: Row) -> str:
    loss = [] if row.loss is None else [decimal(row.loss)]
    return " ".join([*loss, *([] if row.state == "finished" else [row.state])])


def _above(row: Row) -> str:
    seeds = f", {counted(row.above['above_best_seeds'], 'seed')}" if row.above else ""
    return (translated("none: ") if row.is_tied else "") + with_interval(row.above, "above_best") + seeds


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def text_table(rows: Sequence[Row]) -> str:
    """The table for the terminal."""
    if not rows:
        return ""
    columns = columns_of(rows)
    lines = [[*map(shown, row.point.values()), *(cell(row) for _, cell in columns)] for row in rows[:SHOWN]]
    more = len(rows) - len(lines)
    return table(lines, [*rows[0].point, *(name for name, _ in columns)]) + (
        translated(f"\nand {more} more in results.csv") if more else ""
    )


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
        **{key: summary.get(key) for key in ("choices", *CHOICE, *COST)},
        "verdict": summary.get("verdict"),
        "steps": summary.get("steps"),
        "seconds": round(record.seconds, 3),
        "folder": f"trials/{record.folder.name}",
        "error": record.error,
    }
