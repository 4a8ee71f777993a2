"""What `train run` and `train eval` say of a run, in both languages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llava_core.shards.writer import ShardWriter
from tests.support.commands import call
from tests.support.runs import config, flags_of
from tests.support.shards import CAPTIONS, TOKENS, WIDTH, header, outcome


def test_the_run_and_eval_say_the_same(world: Path, tmp_path: Path) -> None:
    """These captions have nothing to do with their random features, and the steps are few."""
    flags = flags_of(config(world, tmp_path / "run", epochs=8))
    ended = call("train", "run", *flags, "--json")
    assert ended.summary["verdict"] == "underfitting"
    lines = ended.err.splitlines()
    place = lines.index(f"verdict: {ended.summary['verdict']}")
    told = ended.summary["verdict_evidence"]
    assert lines[place + 1 : place + 2 + len(told)] == [
        *(f"  {evidence}" for evidence in told),
        f"  next: {ended.summary['verdict_next']}",
    ]
    given = ("--checkpoint", tmp_path / "run/last", "--llm", world / "llm", "--device", "cpu")
    held_out = ("--features", world / "held-out", "--instructions", "mixed", "--json")
    assert call("train", "eval", *given, *held_out).summary["verdict"] == ended.summary["verdict"]
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.write_bytes(b'{"step": 0, "eval_lo\xff\n' + metrics.read_bytes())
    ended = call("train", "eval", *given, *held_out)
    assert f"{metrics}: 1 damaged line left out" in ended.err
    assert ended.summary["verdict"] == "underfitting"
    ended = call("train", "eval", *given, *held_out, "--max-samples", 5)
    assert "evaluated on other rows (--eval-samples 512)" in ended.err  # and its curve does not count
    assert ended.summary["verdict"] == "blind"
    metrics.unlink()  # then by the gap and the answers alone
    assert call("train", "eval", *given, *held_out).summary["verdict"] == "blind"


def test_the_training_loss_of_the_last_step_counts(world: Path, tmp_path: Path) -> None:
    """That of a run of two steps is its only one. Here it began lower than it ended."""
    call("train", "run", *flags_of(config(world, tmp_path / "run", epochs=1, max_steps=2, log_every=10)))
    path = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(line for line in lines if "eval_loss" in line)
    first["eval_loss"] /= 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ("--checkpoint", tmp_path / "run/last", "--llm", world / "llm", "--device", "cpu")
    held_out = ("--features", world / "held-out", "--instructions", "mixed", "--json")
    told = call("train", "eval", *given, *held_out).summary
    (trained,) = (line["loss"] for line in lines if "loss" in line)
    assert told["verdict"] == "diverging"
    assert told["verdict_evidence"][1] == f"training loss {trained:.3f} in the last steps"


def test_what_was_learnt_by_heart_is_healthy_by_its_own_rows(world: Path, tmp_path: Path) -> None:
    """One evaluation between the ends; `eval` reads the same rows under another name."""
    seen = {"epochs": 20, "eval_features": world / "features", "eval_every": 200}
    call("train", "run", *flags_of(config(world, tmp_path / "run", **seen)))
    (tmp_path / "same").symlink_to(world / "features")
    given = ("--checkpoint", tmp_path / "run/last", "--llm", world / "llm", "--device", "cpu")
    ended = call("train", "eval", *given, "--features", tmp_path / "same", "--json")
    assert ended.summary["verdict"] == "healthy"
    assert "before the first step" in ended.summary["verdict_evidence"][0]


@pytest.mark.parametrize("pictures", [1, 3])
def test_rows_of_one_picture_are_no_broken_data(world: Path, tmp_path: Path, pictures: int) -> None:
    """Four captions of each picture, one after the other; or one picture alone."""
    with ShardWriter(tmp_path / "features/a.h5", header(CAPTIONS[:4] * pictures)) as writer:
        shown = [outcome(row // 4) for row in range(4 * pictures)]
        rows = [
            dataclasses.replace(each, row=row, sha256=bytes([row // 4 + 1] * 32))
            for row, each in enumerate(shown)
        ]
        writer.write(rows)
        writer.finish()
    given = config(world, tmp_path / "run", features=tmp_path / "features")
    assert call("train", "run", *flags_of(given), "--json").summary["verdict"] != "broken data"


def test_features_that_say_nothing_in_chinese(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = header([CAPTIONS[row % 4] for row in range(12)])
    with ShardWriter(tmp_path / "features/a.h5", given) as writer:
        rows = [outcome(row) for row in range(12)]
        zeros = np.zeros((TOKENS, WIDTH), "<f2")
        writer.write([dataclasses.replace(row, features=zeros) if row.row % 2 else row for row in rows])
        writer.finish()
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    flags = flags_of(config(world, tmp_path / "run", features=tmp_path / "features"))
    ended = call("train", "run", *flags, "--json")
    assert ended.summary["verdict"] == "broken data"
    assert "结论：数据有问题" in ended.err
    assert "50% 的行特征为零，或与其他行相同" in ended.err
    assert "下一步：用 `extract inspect --html` 查看这些行" in ended.err


def test_none_without_held_out_rows(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", eval_features=None, max_steps=1)
    ended = call("train", "run", *flags_of(given), "--json")
    assert "no verdict without held-out rows (--eval-features)" in ended.err
    assert "verdict" not in ended.summary


def test_features_that_are_all_zero_are_refused(world: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "features/a.h5", header([CAPTIONS[0]] * 4)) as writer:
        zeros = np.zeros((TOKENS, WIDTH), "<f2")
        writer.write([dataclasses.replace(outcome(row), features=zeros) for row in range(4)])
        writer.finish()
    given = config(world, tmp_path / "run", features=tmp_path / "features", eval_features=None)
    for start in ("scale", "captions", "torch"):
        line = call("train", "run", *flags_of(given), "--start", start, code=1).one_line()
        assert "the features of the first 4 rows are all zero; look at them" in line
