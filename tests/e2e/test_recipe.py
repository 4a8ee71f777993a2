"""`train run --recipe`: which flags it stands for, and that what it adds continues exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import yaml

from tests.support.commands import call, started, wait_until
from tests.support.runs import config, curve, flags_of, weights
from train.config import RunConfig
from train.recipes import RECIPES
from train.run import run as train_run


def test_recipes_hold_flags_that_exist() -> None:
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    for flags in RECIPES.values():
        assert set(flags) <= fields
        RunConfig(features=Path(), llm=Path(), out=Path(), **flags)


def test_fast_with_a_rate_of_ones_own_continues_bit_for_bit(world: Path, tmp_path: Path) -> None:
    typed = config(world, tmp_path / "cut", epochs=10, keep=1000)  # with a --lr, a --batch-size and more
    with started("train", "run", *flags_of(typed), "--recipe", "fast") as process:
        wait_until(process, (tmp_path / "cut/step-00000030").exists)
    # The folder holds the flags themselves: the same ones, given one by one, continue it.
    meant = dataclasses.replace(typed, start="captions", optimizer="muon", decay="linear")
    held = yaml.safe_load((tmp_path / "cut/training_config.yaml").read_text())
    assert (held["start"], held["optimizer"], held["lr"], held["batch_size"]) == ("captions", "muon", 0.02, 4)
    train_run(dataclasses.replace(meant, resume=True))
    train_run(dataclasses.replace(meant, out=tmp_path / "whole"))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_unknown_recipes(world: Path, tmp_path: Path) -> None:
    ended = call("train", "run", *flags_of(config(world, tmp_path / "run")), "--recipe=slow", code=2)
    assert ended.one_line() == "error: unknown --recipe 'slow'; expected course, fast, course-stage2, stage2"
