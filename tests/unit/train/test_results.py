"""The table of a sweep, and its pictures for few trials and for many."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from train.sweep.config import SweepConfig
from train.sweep.page import write_page
from train.sweep.pareto_plot import pareto
from train.sweep.plot_style import LIGHT
from train.sweep.plots import draw
from train.sweep.record import Record, State
from train.sweep.results import text_table
from train.sweep.rows import best_of, how_sure, rows_of
from train.sweep.space import Point, Space


def record(
    number: int, point: Point, loss: float | None, state: State = "finished", **more: object
) -> Record:
    return Record(number, state, point, Path(f"trials/{number:04d}"), loss, **more)  # type: ignore[arg-type]


def test_seeds_are_one_row_with_their_mean_and_spread() -> None:
    rows = rows_of(
        [
            record(0, {"lr": 0.1, "seed": 0}, 2.0, summary={"eval_grounding_gap": 0.5}, seconds=30.0),
            record(1, {"lr": 0.2, "seed": 0}, 1.0),
            record(2, {"lr": 0.3, "seed": 0}, 0.5, "pruned"),
            record(3, {"lr": 0.1, "seed": 1}, 1.5, summary={"eval_grounding_gap": 0.7}, seconds=31.0),
            record(4, {"lr": 0.2, "seed": 1}, 3.0),
            record(5, {"lr": 0.4, "seed": 0}, None, "failed", error="because"),
            record(6, {"lr": 0.4, "seed": 1}, None, "failed", error="because"),
            record(7, {"lr": 0.5, "seed": 0}, 9.0),
            record(8, {"lr": 0.5, "seed": 1}, None, "failed", error="because"),
        ]
    )
    lines = [line.split() for line in text_table(rows).splitlines()]
    assert lines[0] == "lr held-out loss above the best spread grounding gap finished time".split()
    assert lines[2:] == [
        ["0.1", "1.7500", "-", "0.5000", "0.6000", "2", "of", "2", "1.02", "min"],
        ["0.2", "2.0000", "-", "2.0000", "-", "2", "of", "2", "0", "s"],
        ["0.5", "9.0000", "-", "-", "-", "1", "of", "2", "0", "s"],
        ["0.3", "0.5000", "pruned", "-", "-", "-", "0", "of", "1", "0", "s"],
        ["0.4", "failed", "-", "-", "-", "0", "of", "2", "0", "s"],
    ]
    best = best_of(rows)
    assert best is not None
    assert best.number == 3  # the better one of the best row, not the best of all


def test_the_table_says_which_differences_are_none(tmp_path: Path) -> None:
    """Paired by picture and by seed: what all trials find hard widens no difference."""
    random = np.random.default_rng(0)
    hard, tokens = random.uniform(5, 50, size=60), np.full(60, 20)
    records = []
    points = [(1, 0.0), (1, 0.1), (2, 0.2), (2, -0.1), (3, 2.0), (3, 2.2), (4, 3.0), (5, 4.0)]
    for number, (lr, more) in enumerate(points):
        losses = hard + more + random.normal(0, 1, size=60)
        folder = tmp_path / str(number)
        folder.mkdir()
        held_out = np.array("others" if lr == 4 else "rows")
        if lr != 5:  # a trial of an earlier version
            np.savez(folder / "held_out.npz", rows=held_out, loss=losses, tokens=tokens)
        point: Point = {"lr": lr, "seed": number % 2}
        records.append(Record(number, "finished", point, folder, losses.sum() / tokens.sum()))
    rows = rows_of(records)
    assert [row.point["lr"] for row in rows[2:]] == [3, 4, 5]
    assert [row.is_tied for row in rows] == [False, True, False, False, False]
    assert rows[3].above == rows[4].above == {}
    difference = rows[2].above
    assert difference["above_best"] == pytest.approx((rows[2].loss or 0) - (rows[0].loss or 0))
    assert 0 < difference["above_best_low"] < difference["above_best"] < difference["above_best_high"] < 0.2
    lines = text_table(rows).splitlines()
    assert re.search(r" none: -?0\.\d{4} \(-0\.\d{4} to 0\.\d{4}\), 2 seeds ", lines[3])
    assert re.search(r"[^:] 0\.1\d{3} \(0\.\d{4} to 0\.\d{4}\), 2 seeds ", lines[4])
    told = "of 4 other points, 1 cannot be told from the best by these held-out rows"
    assert how_sure(rows) == f"{told}, and 2 kept no losses of the same rows and seeds"


def test_held_out_losses_are_read_once_and_again_when_they_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is written after every trial: what it takes must not grow with their square."""
    read: list[str] = []
    load = np.load

    def counted(path: Path) -> object:
        read.append(path.parent.name)
        return load(path)

    def keep(trial: int, add: float) -> Record:
        partial = tmp_path / "held_out.part"
        with partial.open("wb") as file:
            losses = np.arange(9.0) + add
            np.savez(file, rows=np.array("rows"), loss=losses, tokens=np.ones(9, int))
        (tmp_path / str(trial)).mkdir(exist_ok=True)
        partial.replace(tmp_path / str(trial) / "held_out.npz")
        kept = record(trial, {"lr": trial}, add)
        return dataclasses.replace(kept, folder=tmp_path / str(trial))

    def above(records: list[Record]) -> list[float]:
        return [row.above["above_best"] for row in rows_of(records)[1:]]

    monkeypatch.setattr(np, "load", counted)
    records: list[Record] = []
    for trial in range(4):
        records.append(keep(trial, trial))
        rows_of(records)
    assert read == ["0", "1", "2", "3"]
    assert above(records) == pytest.approx([1, 2, 3])
    records[2] = keep(2, 2.5)
    assert above(records) == pytest.approx([1, 2.5, 3])
    assert read == ["0", "1", "2", "3", "2"]


@pytest.mark.parametrize("content", [b"", b"PK", bytes(99)])
def test_what_a_loss_of_power_left_of_a_trial_s_losses_is_as_if_gone(tmp_path: Path, content: bytes) -> None:
    for name in ("held_out", "choices"):
        (tmp_path / f"{name}.npz").write_bytes(content)
    records = [dataclasses.replace(record(k, {"lr": float(k)}, 1.0 + k), folder=tmp_path) for k in range(2)]
    assert [(row.above, row.choice) for row in rows_of(records)] == [({}, {})] * 2


def test_a_sweep_of_nothing_finished_has_no_best() -> None:
    assert best_of([]) is None
    assert text_table([]) == ""
    assert best_of(rows_of([record(0, {"lr": 1.0}, 2.0, "pruned")])) is None


WIDE = (
    "lr=1e-4..1e-2:log",
    "projector=linear,mlp",
    "visual_tokens=all,patches,pool,shuffle",
    "batch_size=8..64",
)


@pytest.mark.parametrize(
    ("space", "trials", "pictures"),
    [
        (["seed=0,1"], 2, ["curves"]),
        (["projector=mlp"], 1, ["curves"]),
        (["lr=1e-3,2e-3"], 2, ["loss-lr", "curves"]),
        (["lr=1e-3", "projector=linear,mlp"], 2, ["loss-lr", "curves", "parallel"]),
        (WIDE, 50, ["loss-lr", "curves", "parallel"]),
    ],
)
def test_few_trials_and_many_are_drawn(
    tmp_path: Path, space: list[str], trials: int, pictures: list[str]
) -> None:
    config = SweepConfig(
        features=(Path("f"), Path("g")),
        llm=Path("l"),
        eval_features=Path("e"),
        out=tmp_path,
        space=tuple(space),
        trials=trials,
    )
    varied, records = Space.of(space, config), []
    points = list(varied.grid()) if varied.is_grid else [wide(k) for k in range(trials)]
    for number, point in enumerate(points):
        folder = tmp_path / f"trials/{number:04d}"
        folder.mkdir(parents=True)
        loss = 2 + math.sin(number) if number % 9 else 80.0
        lines = [{"step": step, "eval_loss": loss + 5 / (1 + step)} for step in (0, 100, 200)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
        state: State = "pruned" if number % 7 == 6 else "finished"
        records.append(Record(number, state, point, folder, loss))
    drawn = draw(tmp_path, varied, rows_of(records))
    assert [picture.name for picture in drawn] == pictures
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == sorted(pictures)
    for picture in drawn:
        assert "#e9e6df" in picture.dark
        assert "#e9e6df" not in picture.light
    write_page(config, varied, rows_of(records), drawn, command=None)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<tr") == 1 + len(rows_of(records))
    assert "<dd>f, g</dd>" in page


@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.04, 0.5, 9.0, 1e4])
def test_operations_have_ticks_however_alike_they_are(spread: float) -> None:
    """By an equal budget they differ by the part of a step that it does not pay."""
    records = [
        record(
            k, {"projector": f"p{k}", "lr": 1.0}, 1.0 + k, summary={"operations": 5.5e10 * (1 + spread * k)}
        )
        for k in range(20)
    ]
    figure = pareto(rows_of(records), LIGHT)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    shown = [label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
             if low <= tick <= high]  # fmt: skip
    assert len(shown) == len(set(shown)) >= 2
    assert [text.get_text() for text in axes.texts] == ["p0"]  # the front, of many points
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["on the front", "beaten at the same cost or less"]


def wide(k: int) -> Point:
    return {
        "lr": 10 ** (-4 + 2 * k / 49),
        "projector": ("linear", "mlp")[k % 2],
        "visual_tokens": ("all", "patches", "pool", "shuffle")[k % 4],
        "batch_size": 8 + k,
    }
