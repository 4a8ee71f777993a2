"""`train sweep --budget` and `--choices`: trials that spend the same, judged by forced choice, too."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.browser import dom_of
from tests.support.commands import call, started, wait_until
from tests.support.runs import curve, weights, write_runs
from tests.support.shards import write_shard
from tests.support.sweeps import command, results, sweep
from train.sweep import trial_steps
from train.sweep.budget import Budget
from train.sweep.command import run as sweep_run

SPACE = ("visual_tokens=all,pool", "seed=0,1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("equal"))


def by_trial(out: Path) -> dict[int, dict[str, Any]]:
    return dict(sorted(results(out).items()))


def step_operations(world: Path, out: Path) -> dict[str, float]:
    """Operations of a step by visual tokens, of runs of one step each."""
    sweep_run(sweep(world, out, SPACE[0], max_steps=1))
    return {line["visual_tokens"]: line["operations"] for line in by_trial(out).values()}


def test_equal_steps_go_on_beyond_an_epoch_and_end_the_schedule(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "projector=linear,mlp", "seed=0,1", budget="steps=17")
    ended = call(*command(given), "--together", 2)
    assert "2 points of projector, each with 2 seeds" in ended.err
    lines = by_trial(given.out)
    assert [line["steps"] for line in lines.values()] == [17] * 4
    rates = curve(given.out / "trials/0000", "lr")
    assert max(rates) == 17
    assert rates[17] < 0.02 * max(rates.values())
    assert re.search(r" none: .*, 2 seeds |[^:] 0\.\d{4} \(.*\), 2 seeds ", ended.out)
    again = yaml.safe_load((given.out / "best.yaml").read_text())
    assert (again["max_steps"], again["epochs"]) == (17, 2)
    plain = sweep(world, tmp_path / "plain", "projector=linear,mlp", "seed=0,1", max_steps=17, epochs=2)
    sweep_run(plain)
    for trial, line in by_trial(plain.out).items():
        assert lines[trial]["eval_loss"] == pytest.approx(line["eval_loss"], rel=1e-5)


def test_equal_operations_are_steps_in_proportion_and_a_killed_trial_keeps_its_own(
    world: Path, tmp_path: Path
) -> None:
    each = step_operations(world, tmp_path / "one")
    assert each["pool"] < 0.95 * each["all"]
    budget = f"flops={50.5 * each['all']:.6e}"
    given = sweep(world, tmp_path / "cut", *SPACE, budget=budget, save_every=4, keep=100)
    with started(*command(given)) as process:
        wait_until(process, (tmp_path / "cut/trials/0000/step-00000016").exists)
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert f"trial 0 (visual_tokens=all seed=0): --budget {Budget.of(budget)} is 50 steps" in err
    figures = sweep_run(given)
    assert figures["finished"] == 4
    cheap = int(50.5 * each["all"] / each["pool"])
    lines = by_trial(given.out)
    assert [line["steps"] for line in lines.values()] == [50, cheap, 50, cheap]
    for line in lines.values():
        assert line["operations"] == pytest.approx(50.5 * each["all"], rel=0.03)
    whole = dataclasses.replace(given, out=tmp_path / "whole")
    sweep_run(whole)
    for trial in ("0000", "0001"):
        cut_run, whole_run = (run.out / "trials" / trial for run in (given, whole))
        assert curve(cut_run, "eval_loss") == curve(whole_run, "eval_loss")
        assert all(torch.equal(weights(cut_run)[k], v) for k, v in weights(whole_run).items())


def test_equal_seconds_are_measured_once_for_each_kind_and_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []
    measure = trial_steps.measured_rate

    def rate(given: Any, resources: Any) -> float:
        before = torch.get_rng_state()
        assert measure(given, resources) > 0  # as it is measured, which must change nothing
        assert torch.equal(torch.get_rng_state(), before)
        measured.append(given.visual_tokens)
        return 4.0 if given.visual_tokens == "all" else 7.0

    monkeypatch.setattr(trial_steps, "measured_rate", rate)
    given = sweep(world, tmp_path / "out", *SPACE, budget="seconds=3")
    sweep_run(given)
    assert measured == ["all", "pool"]
    assert [line["steps"] for line in by_trial(given.out).values()] == [12, 21, 12, 21]
    err = capfd.readouterr().err
    assert "is 12 steps, at 4 steps/s as measured here, evaluations left out" in err
    assert err.count("frozen:") == 4  # the short runs print nothing
    (given.out / "study.journal").rename(tmp_path / "journal")
    monkeypatch.setattr(trial_steps, "measured_rate", lambda *_: 100.0)
    assert sweep_run(given)["finished"] == 4  # the folders of the trials say what they began with
    assert [line["steps"] for line in by_trial(given.out).values()] == [12, 21, 12, 21]


def test_trials_that_differ_in_cost_share_no_pass(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    each = step_operations(world, tmp_path / "one")
    budget = f"flops={6 * each['all']}"
    given = sweep(world, tmp_path / "out", SPACE[0], "lr=1e-3,2e-3", budget=budget, together=4)
    figures = sweep_run(given)
    assert (figures["finished"], figures["failed"]) == (4, 0)
    assert "cannot train together" not in capfd.readouterr().err
    sweep_run(sweep(world, tmp_path / "kinds", SPACE[0], budget=budget, together=4))
    words = "--together does nothing here: visual_tokens changes what a step reads or costs"
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--budget", "flops=1e9", "--max-steps", 3), "--max-steps beside --budget, which sets the steps"),
        (("--budget", "steps=9", "--epochs", 3), "--epochs beside --budget, which sets the steps"),
        (("--budget", "steps=1.5"), "--budget; expected steps=N (whole), flops=N such as 2e15, or seconds=N"),
        (("--budget", "hours=1"), "or seconds=N, above 0; got hours=1"),
        (("--budget", "steps=0"), "got steps=0"),
        (("--choices", 1), "--choices; expected 2 or more; got 1"),
        (
            ("--budget", "flops=1e3"),
            "--space visual_tokens=all: --budget buys less than one step; expected flops=",
        ),
    ],
)
def test_wrong_usage(world: Path, tmp_path: Path, flags: tuple[Any, ...], words: str) -> None:
    given = sweep(world, tmp_path / "out", *SPACE)
    line = call(*command(given), *flags, code=2).one_line()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_the_least_budget_that_is_named_is_enough(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "seed=0", budget="flops=1")
    line = call(*command(given), code=2).one_line()
    least = re.fullmatch(r"error: --budget buys .*; expected (\S+) or more; got flops=1", line)
    assert least
    enough = dataclasses.replace(given, budget=least[1])
    assert sweep_run(enough)["finished"] == 1
    assert by_trial(given.out)[0]["steps"] == 1


def test_what_varies_the_steps_is_refused_beside_a_budget(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "max_steps=3,4", budget="steps=9")
    assert "--max-steps beside --budget" in call(*command(given), code=2).one_line()


def test_a_drawn_trial_that_the_budget_does_not_pay_is_named(world: Path, tmp_path: Path) -> None:
    """The plan sees the middle of a range alone."""
    step = step_operations(world, tmp_path / "one")["all"]
    given = sweep(world, tmp_path / "out", "batch_size=1..16", trials=6, budget=f"flops={2.2 * step}")
    figures = sweep_run(given)
    assert figures["failed"]
    assert figures["finished"]
    failed = [line for line in by_trial(given.out).values() if line["state"] == "failed"]
    for line in failed:
        assert f"trial {line['trial']} (batch_size={line['batch_size']})" in line["error"]


def test_a_sweep_has_one_budget(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3", budget="steps=3", choices=2)
    sweep_run(given)
    without = dataclasses.replace(given, budget=None)
    assert (
        "a sweep with another --budget; expected steps=3; got none"
        in call(*command(without), code=1).one_line()
    )
    more = dataclasses.replace(given, choices=3)
    assert "a sweep with another --choices" in call(*command(more), code=1).one_line()
    older = yaml.safe_load((given.out / "sweep.yaml").read_text())
    assert older["flags"].pop("budget") == "steps=3"
    assert older["flags"].pop("choices") == 2
    plain = sweep(world, tmp_path / "plain", "lr=1e-3", max_steps=3)
    sweep_run(plain)
    kept = yaml.safe_load((plain.out / "sweep.yaml").read_text())
    del kept["flags"]["budget"], kept["flags"]["choices"]
    (plain.out / "sweep.yaml").write_text(yaml.safe_dump(kept))  # as earlier versions wrote it
    assert sweep_run(plain)["finished"] == 1


def test_forced_choice_is_that_of_infer_rank(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", *SPACE, max_steps=8, choices=4)
    ended = call(*command(given))
    assert "4-way choice" in ended.out
    assert "with shuffled pictures (chance 0.25)" in ended.out
    lines = by_trial(given.out)
    for line in lines.values():
        ranked = call(
            *("infer", "rank", "--checkpoint", given.out / line["folder"] / "last", "--llm", world / "llm"),
            *("--features", world / "held-out", "--choices", 4, "--device", "cpu", "--json"),
            *("--output", tmp_path / f"{line['trial']}.jsonl"),
        ).summary
        for end in ("", "_low", "_high"):
            assert line[f"choice_accuracy{end}"] == ranked[f"accuracy{end}"]
        assert 0 <= line["choice_accuracy_shuffled_low"] <= line["choice_accuracy_shuffled"] <= 1
        assert line["choices"] == 4
    with (given.out / "results.csv").open() as file:
        (first, *_) = csv.DictReader(file)
    assert first["tokens_per_picture"] == {"all": "5", "pool": "1"}[first["visual_tokens"]]
    assert float(first["operations"]) > 0
    assert int(first["trained_parameters"]) > 0
    dom = dom_of(given.out / "index.html", tmp_path)
    for words in ("4-way choice", "tokens per image", "operations", "FLOP", ", 2 seeds"):
        assert words in dom
    assert dom.count("Held-out loss against the operations") == 2  # as the alternative text, and below
    assert (given.out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_more_choices_than_captions_end_it_before_anything_trains(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3", max_steps=2, choices=64)
    for more in ((), ("--dry-run",)):
        line = call(*command(given), *more, code=1).one_line()
        assert "--choices 64; expected at most 10, the different captions in" in line
        assert not given.out.exists()
    assert sweep_run(dataclasses.replace(given, choices=10))["finished"] == 1


def test_a_caption_too_long_to_choose_ends_it_before_anything_trains(world: Path, tmp_path: Path) -> None:
    """Training cuts it, so each trial would fail after its last step."""
    write_shard(tmp_path / "held-out/c.h5", rows=4, caption="a" * 1100)
    given = sweep(world, tmp_path / "out", "lr=1e-3", max_steps=2, eval_features=tmp_path / "held-out")
    line = call(*command(dataclasses.replace(given, choices=2)), code=1).one_line()
    assert "--choices: the longest held-out caption does not fit the language model's context" in line
    assert not given.out.exists()
    assert sweep_run(given)["finished"] == 1
