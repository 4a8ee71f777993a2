"""The page of a sweep, index.html: one self-contained file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from llava_core.cli.console import counted, human_seconds
from llava_core.cli.translation import translated, translated_error
from llava_core.filesystem import replace_text
from llava_core.report.page import report
from llava_core.report.tables import facts, table, totals
from train.sweep.config import SweepConfig
from train.sweep.plots import Plot
from train.sweep.record import Record
from train.sweep.results import columns_of, decimal
from train.sweep.rows import Row, best_of
from train.sweep.scaling import HEAD, ScalingCurve, lines_of, sentences
from train.sweep.space import Space, shown, words


def write_page(
    config: SweepConfig,
    space: Space,
    rows: Sequence[Row],
    plots: Sequence[Plot],
    command: str | None,
    scaling_curves: Sequence[ScalingCurve] = (),
) -> None:
    """Write OUT/index.html; `command` repeats the best run."""
    records = [record for row in rows for record in row.records]
    best = best_of(rows)
    parts = {
        "title": escape(config.out.name),
        "subtitle": translated(
            f"A sweep of {escape(', '.join(space.keys))}: {counted(space.size(config.trials), 'trial')}"
        ),
        "totals": _totals(space, rows, records, best),
        "scaling": "".join(map(_scaling, scaling_curves)),
        "best": _best(best, command, (config.out / "best").exists()),
        "pictures": "".join(map(_figure, plots)) or _note(translated("No trial was evaluated.")),
        "table": _table(space, rows),
        "failures": _failures(records),
        "facts": _facts(config, space),
    }
    command_name = "train scaling" if scaling_curves else "train sweep"
    page = report(Path(__file__).with_name("page.html"), parts, command_name)
    replace_text(config.out / "index.html", page)


def _totals(space: Space, rows: Sequence[Row], records: Sequence[Record], best: Record | None) -> str:
    numbers = {"points": f"{len(rows):,}"}
    for state in ("finished", "pruned", "failed", "running", "interrupted"):
        n = sum(record.state == state for record in records)
        if n or state == "finished":
            numbers[state] = f"{n:,}"
    numbers["loss of the best"] = decimal(best.loss if best else None)
    numbers["of training"] = human_seconds(sum(record.seconds for record in records))
    return totals(numbers)


def _best(best: Record | None, command: str | None, kept: bool) -> str:
    if best is None or command is None:
        return ""
    checkpoint = translated(
        "Its checkpoint is <code>best</code>, beside this page" if kept else "Its checkpoint is gone"
    )
    return (
        f'<section aria-labelledby="best"><h2 id="best">{translated("Best")}</h2>'
        + _note(
            translated(f"Trial {best.number}, {escape(words(best.point))}.")
            + translated(f" {checkpoint}; this makes it again:")
        )
        + f"<pre>{escape(command)}</pre></section>"
    )


def _scaling(curve: ScalingCurve) -> str:
    notes = "".join(f"<p>{escape(_sentence(translated(line)))}</p>" for line in sentences(curve))
    title = escape(" ".join([translated("More rows"), words(curve.point)]).strip())
    lines = table(HEAD, [[("", line) for line in lines_of(curve)]])
    return f"<section><h2>{title}</h2>{notes}<div class=wide>{lines}</div></section>"


def _figure(plot: Plot) -> str:
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for svg in (plot.light, plot.dark)
    )
    return (
        f"<figure{' class=broad' if plot.broad else ''}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(translated(plot.caption))}"></picture>'
        f"<figcaption>{escape(_sentence(translated(plot.caption)))}</figcaption></figure>"
    )


def _table(space: Space, rows: Sequence[Row]) -> str:
    columns, lines = columns_of(rows), []
    for k, row in enumerate(rows):
        kind = "best" if k == 0 and row.finished else "failed" if row.state == "failed" else ""
        values = [shown(row.point.get(key, "-")) for key in space.axes]
        lines.append((kind, [*values, *(cell(row) for _, cell in columns)]))
    head = [*(key.replace("_", " ") for key in space.axes), *(name for name, _ in columns)]
    return table(head, [lines])


def _failures(records: Sequence[Record]) -> str:
    failed = [
        f"<div><dt>{translated(f'Trial {record.number}')}, {escape(words(record.point))}</dt>"
        f"<dd>{escape(translated_error(record.error))}</dd></div>"
        for record in records
        if record.error
    ]
    if not failed:
        return ""
    return (
        f'<section aria-labelledby="failures"><h2 id="failures">{translated("Failures")}</h2>'
        f'<dl class="failures">{"".join(failed)}</dl></section>'
    )


def _facts(config: SweepConfig, space: Space) -> str:
    flags = {
        key: value
        for key, value in vars(config).items()
        if key not in {*space.keys, "space", "json", "resume", "dry_run", "ray", "ray_workers"}
        and value not in (None, ())
    }
    parts = {"Varied": space.plain(), "Common to all": flags}
    return facts({title: {k: _shown(v) for k, v in values.items()} for title, values in parts.items()})


def _shown(value: object) -> str:
    return ", ".join(map(shown, value)) if isinstance(value, (list, tuple)) else shown(value)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + translated(".")


def _note(text: str) -> str:
    return f'<p class="note">{text}</p>'
