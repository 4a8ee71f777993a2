"""Several projectors in one pass through the language model: each learns what it would learn alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.errors import LlavaError
from llava_core.language.model import LanguageModel
from llava_core.types import JsonDict
from tests.support.runs import config, curve, weights
from train.config import RunConfig
from train.data.packing import Row
from train.model.loss import packed_losses
from train.resources import TrainingResources
from train.run import run, train


def members(world: Path, out: Path) -> list[RunConfig]:
    """They differ in all that may differ, the number of visual tokens included."""
    return [
        config(world, out / "linear"),
        config(world, out / "mlp", projector="mlp", lr=1e-3),
        config(world, out / "patches", visual_tokens="pool", warmup=0.5, weight_decay=0.1),
        config(world, out / "fast", start="captions", optimizer="muon", lr=0.05),
    ]


@pytest.mark.parametrize("micro_tokens", [16_384, 360])
def test_each_curve_is_that_of_the_lone_run(world: Path, tmp_path: Path, micro_tokens: int) -> None:
    configs = [
        dataclasses.replace(c, micro_tokens=micro_tokens) for c in members(world, tmp_path / "together")
    ]
    outcomes = train(configs, TrainingResources(configs[0]))
    for alone, outcome in zip(members(world, tmp_path / "alone"), outcomes, strict=True):
        assert isinstance(outcome, dict)
        summary = run(alone)
        assert outcome["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
        assert curve(Path(outcome["out"])) == pytest.approx(curve(alone.out), rel=1e-5)


def test_one_that_diverges_leaves_the_others_alone(world: Path, tmp_path: Path) -> None:
    configs = [config(world, tmp_path / "good"), config(world, tmp_path / "bad", lr=1e3, weight_decay=1e6)]
    good, bad = train(configs, TrainingResources(configs[0]))
    assert isinstance(good, dict)
    assert isinstance(bad, LlavaError)
    assert "learning rate" in str(bad)
    alone = run(config(world, tmp_path / "alone"))
    assert good["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


BLIND = """
import torch

class Blind(torch.nn.Linear):
    steps = 0

    def forward(self, features):
        self.steps += self.training and torch.is_grad_enabled()
        return super().forward(features) * (1 if self.training or self.steps < 10 else float("nan"))
"""
"""A projector whose numbers are not finite in evaluations after the first step."""


def test_those_that_diverge_have_a_line_each(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, in an evaluation alone, and all of them."""
    (tmp_path / "blind.py").write_text(BLIND)
    monkeypatch.syspath_prepend(tmp_path)
    bad = config(world, tmp_path / "bad", lr=1e3, weight_decay=1e6)
    blind = config(world, tmp_path / "blind", projector="blind:Blind")
    good = config(world, tmp_path / "good")
    outcomes = train([bad, good, blind], TrainingResources(good))
    failed = [str(outcome) for outcome in outcomes if isinstance(outcome, LlavaError)]
    assert [text.partition(",")[0] for text in failed] == [
        "the loss is nan at step 6",
        "the loss is nan at step 10",
    ]
    assert isinstance(outcomes[1], dict)
    assert outcomes[1]["eval_loss"] == curve(good.out, "eval_loss")[24]
    assert not (blind.out / "last").exists()
    again = [dataclasses.replace(each, out=each.out.with_suffix(".again")) for each in (bad, blind)]
    assert all(isinstance(outcome, LlavaError) for outcome in train(again, TrainingResources(good)))


def test_one_that_is_behind_catches_up(world: Path, tmp_path: Path) -> None:
    """As after a kill between the checkpoints of two runs."""
    configs = members(world, tmp_path / "whole")[:2]
    whole = train(configs, TrainingResources(configs[0]))
    configs = [dataclasses.replace(c, out=tmp_path / "torn" / c.out.name) for c in configs]
    ahead = TrainingResources(configs[0])

    def stop(index: int, step: int, figures: JsonDict) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configs[:1], ahead, stop)
    assert (configs[0].out / "last").exists()
    assert not configs[1].out.exists()
    torn = train(configs, TrainingResources(configs[0]))
    for left, right in zip(whole, torn, strict=True):
        assert isinstance(left, dict)
        assert isinstance(right, dict)
        assert left["eval_loss"] == pytest.approx(right["eval_loss"], rel=1e-5)
        for name, expected in weights(Path(left["out"])).items():
            torch.testing.assert_close(weights(Path(right["out"]))[name], expected, rtol=1e-4, atol=1e-6)


def test_a_callback_ends_a_run(world: Path, tmp_path: Path) -> None:
    configs = [config(world, tmp_path / name, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    seen: list[tuple[int, int]] = []

    def on_eval(index: int, step: int, figures: JsonDict) -> bool:
        seen.append((index, step))
        assert math.isfinite(figures["eval_loss"])
        return index == 0

    kept, pruned = train(configs, TrainingResources(configs[0]), on_eval)
    assert isinstance(kept, dict)
    assert isinstance(pruned, dict)
    assert "pruned" not in kept
    assert pruned["pruned"] == pruned["steps"] < kept["steps"]
    assert [index for index, _ in seen].count(1) == 1
    assert (configs[1].out / "last").exists()


def test_runs_of_other_samples_are_refused(world: Path, tmp_path: Path) -> None:
    configs = [config(world, tmp_path / "a"), config(world, tmp_path / "b", seed=1)]
    _, other = train(configs, TrainingResources(configs[0]))
    assert isinstance(other, LlavaError)
    assert "--seed" in str(other)


def test_who_is_behind_and_diverges_leaves_the_others_their_own_batches(world: Path, tmp_path: Path) -> None:
    """The one that was killed before its checkpoint begins anew and fails before it has caught up."""
    good = config(world, tmp_path / "good")
    bad = config(world, tmp_path / "bad", lr=1e3, weight_decay=1e6)

    def stop(index: int, step: int, figures: JsonDict) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train([good], TrainingResources(good), stop)
    assert isinstance(train([good, bad], TrainingResources(good))[1], LlavaError)
    whole = config(world, tmp_path / "whole")
    train([whole], TrainingResources(whole))
    assert curve(good.out) == curve(whole.out)


def test_runs_whose_passes_do_not_fit_the_device_learn_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def packed(llm: LanguageModel, projectors: Any, row: Row) -> list[torch.Tensor]:
        if len(row.positions) > 360:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return packed_losses(llm, projectors, row)

    configs = members(world, tmp_path / "whole")
    whole = train(configs, TrainingResources(configs[0]))
    monkeypatch.setattr("train.loop.packed_losses", packed)
    configs = members(world, tmp_path / "parts")
    for outcome, expected in zip(train(configs, TrainingResources(configs[0])), whole, strict=True):
        assert isinstance(outcome, dict)
        assert isinstance(expected, dict)
        assert outcome["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert curve(Path(outcome["out"])) == pytest.approx(curve(Path(expected["out"])), rel=1e-5)
    assert "no room on cpu for " in capfd.readouterr().err
