"""`train sweep`: killed, shared, pruned, spread over a cluster; and what it writes."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_core.errors import LlavaError
from llava_core.projector.checkpoint import load_checkpoint
from tests.support.browser import dom_of
from tests.support.commands import call, fill, holder, started, wait_until
from tests.support.ray_cluster import ACCESS, ray_cluster
from tests.support.runs import curve, weights, write_runs
from tests.support.shards import write_shard
from tests.support.sweeps import command, results, sweep
from train import cost_prediction, training_run
from train.config import RunConfig
from train.cost_prediction import Prediction
from train.metric_writers import MetricWriters
from train.resources import TrainingResources
from train.sweep import run_trials as trials
from train.sweep.command import run as sweep_run
from train.sweep.config import SweepConfig
from train.sweep.study import MOST_DEATHS, Study
from train.sweep.together import Step

SPACE = ("lr=5e-3,2e-2", "projector=linear,mlp", "weight_decay=0,1e38", "seed=0,1")
"""The weights of the last decay are not finite for long."""


def steps_of(out: Path) -> list[list[int]]:
    """The steps at which each trial was evaluated, in order."""
    return [list(curve(trial, "eval_loss")) for trial in sorted((out / "trials").glob("????"))]


@pytest.fixture(scope="module")
def grid(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "grid"
    figures = sweep_run(sweep(world, out, *SPACE))
    assert (figures["trials"], figures["finished"], figures["failed"]) == (16, 8, 8)
    assert figures["planned_seconds"] > 0
    return out


def test_a_trial_that_fails_ends_no_other(grid: Path) -> None:
    lines = results(grid)
    assert len(lines) == 16
    failed = [line for line in lines.values() if line["state"] == "failed"]
    assert [line["weight_decay"] for line in failed] == [1e38] * 8
    assert all(line["error"].startswith("the loss is nan at step ") for line in failed)
    with (grid / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(line["trial"]) for line in table] == list(lines)  # in one order
    assert table[0].keys() == lines[0].keys()
    finished = [line for line in lines.values() if line["state"] == "finished"]
    for line in finished:
        run_of = grid / line["folder"]
        assert line["eval_loss"] == curve(run_of, "eval_loss")[12]
        assert load_checkpoint(run_of / "last").training["lr"] == line["lr"]
    by_point = collections.defaultdict(list)
    for line in finished:
        by_point[line["lr"], line["projector"]].append(line["eval_loss"])
    means = [sum(losses) / 2 for losses in by_point.values()]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


def test_the_best_is_made_again_by_the_command_that_is_given(
    world: Path,
    grid: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again = sweep_run(sweep(world, grid, *SPACE))  # nothing is left to do
    out, err = capsys.readouterr()
    assert "frozen" not in err
    first = next(iter(results(grid).values()))
    assert again["best"] == {key: first[key] for key in ("trial", "lr", "projector", "weight_decay", "seed")}
    assert (
        out.splitlines()[0].split()
        == "lr projector weight_decay held-out loss above the best spread grounding gap trained parameters "
        "operations finished time".split()
    )
    assert re.match(
        r"0\.02 +mlp +0 +\d\.\d{4} +- +\d\.\d{4} +-?\d\.\d{4} +[\d,]+ +[\d.]+ [MG]FLOP +2 of 2",
        out.splitlines()[2],
    )
    assert out.splitlines()[-1] == f"the best again: {again['command']}"
    arguments = shlex.split(again["command"])
    monkeypatch.chdir(tmp_path)
    call(*arguments[2:])
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name == f"grid-{first['trial']:04d}"  # of this sweep, and this trial
    same, best = weights(made), weights(grid / first["folder"])
    assert all(torch.equal(same[name], best[name]) for name in best)
    assert load_checkpoint(grid / "best").metrics["eval_loss"] == first["eval_loss"]


def test_the_page_shows_all_and_asks_for_nothing(grid: Path, tmp_path: Path) -> None:
    for name in ("loss-lr.png", "parallel.png", "curves.png", "pareto.png"):
        assert (grid / name).read_bytes().startswith(b"\x89PNG")
    text = (grid / "index.html").read_text()
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:)""", text)
    dom = dom_of(grid / "index.html", tmp_path)
    assert dom.count("<picture>") == 4
    assert dom.count("<tr") == 1 + 8
    assert dom.count("the loss is nan at step ") == 8
    assert "python -m train run -c" in dom


def test_one_folder_holds_one_sweep(world: Path, grid: Path) -> None:
    with pytest.raises(LlavaError, match="another --space lr"):
        sweep_run(sweep(world, grid, "lr=5e-3", *SPACE[1:]))
    with pytest.raises(LlavaError, match="another --batch-size"):
        sweep_run(sweep(world, grid, *SPACE, batch_size=8))
    elsewhere = sweep(world, grid, *SPACE, features=world / "no/../features")  # the same by another name
    assert sweep_run(elsewhere)["finished"] == 8


def test_a_full_disk_costs_no_trial(world: Path, small_disk: Path) -> None:
    given = sweep(world, small_disk / "out", "lr=5e-3,2e-2")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 2**15))
    with pytest.raises(OSError, match="No space left on device"):
        sweep_run(given)
    filler.unlink()
    figures = sweep_run(given)
    assert (figures["finished"], figures["failed"]) == (2, 0)
    fill(small_disk)
    line = call(*command(given), code=1).one_line()  # with the table alone to write
    assert line == f"error: No space left on device: {given.out / 'results.csv'}"


def test_one_table_is_of_one_set_of_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world, out = write_runs(tmp_path), tmp_path / "out"
    given = sweep(world, out, "lr=5e-3,2e-2", trials=1)
    sweep_run(given)
    assert (out / "best/model.safetensors").is_file()
    shutil.rmtree(out / "trials")
    capfd.readouterr()
    sweep_run(given)
    assert not (out / "best").is_symlink()
    assert "is gone, and with it the best checkpoint" in capfd.readouterr().err
    write_shard(world / "held-out/d.h5", rows=10, seed=3)
    with pytest.raises(
        LlavaError, match=r"^the held-out rows of the sweep in .* have changed since it began"
    ):
        sweep_run(dataclasses.replace(given, trials=None))


def test_a_dry_run_touches_nothing(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3..1e-1:log", "seed=0,1", trials=3, dry_run=True)
    assert sweep_run(given)["trials"] == 6
    assert not (tmp_path / "out").exists()


def test_wrong_usage(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "projector=lineer")
    line = call(*command(given), code=2).one_line()
    assert line == "error: unknown projector 'lineer'; did you mean 'linear'?; or give package.module:Class"
    for space in ("lr=1e-3..1e-2", "seed=0..2000000000"):
        with pytest.raises(LlavaError, match="--trials 20") as caught:
            sweep_run(sweep(world, tmp_path / "out", space))
        assert caught.value.exit_code == 2
    with pytest.raises(LlavaError, match="no sweep to resume"):
        sweep_run(sweep(world, tmp_path / "out", "lr=1e-3", resume=True))
    with pytest.raises(LlavaError, match="no trial finished; got 1 failure, the last: the loss is nan"):
        sweep_run(sweep(world, tmp_path / "out", "weight_decay=1e38"))


@pytest.mark.parametrize("together", [1, 2])
def test_a_signal_in_the_last_evaluation_of_a_trial_stops_the_sweep(
    world: Path, tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials that have ended by then are recorded; no other begins."""
    evaluate, out = training_run.TrainingRun.evaluate, tmp_path / "out"

    def interrupted(self: training_run.TrainingRun, *arguments: Any) -> None:
        evaluate(self, *arguments)
        if self.done and self.config.out.name == "0000":
            signal.raise_signal(signal.SIGINT)

    given = sweep(world, out, "lr=1e-3,2e-3,4e-3", together=together)
    with monkeypatch.context() as patch:
        patch.setattr(training_run.TrainingRun, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep_run(given)
    assert len(list((out / "trials").glob("????"))) == together
    ended = [(out / "trials" / f"{trial:04}/summary.json").stat().st_mtime_ns for trial in range(together)]
    figures = sweep_run(given)
    assert (figures["finished"], figures["failed"], figures["interrupted"]) == (3, 0, 0)
    for trial, at in enumerate(ended):
        assert (out / "trials" / f"{trial:04}/summary.json").stat().st_mtime_ns == at


def test_a_sweep_that_was_stopped_and_killed_goes_on(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = sweep(world, tmp_path / "cut", "lr=5e-3,2e-2,4e-2", epochs=5, save_every=4, keep=1000)
    with started(*command(given)) as process:
        wait_until(process, (tmp_path / "cut/trials/0000/step-00000020").exists)
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted; the same command continues where it stopped"

    with started(*command(given), "--resume") as process:
        wait_until(process, (tmp_path / "cut/trials/0001/step-00000020").exists)
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert re.search(r"continued at step \d+", err)

    figures = sweep_run(given)
    err = capfd.readouterr().err
    assert len(re.findall(r"continued at step \d+", err)) == 1
    assert "trial 0" not in err
    assert (figures["finished"], figures["interrupted"]) == (3, 0)
    sweep_run(dataclasses.replace(given, out=tmp_path / "whole"))
    for trial in ("0000", "0001", "0002"):
        cut, whole = tmp_path / "cut/trials" / trial, tmp_path / "whole/trials" / trial
        assert curve(cut, "eval_loss") == curve(whole, "eval_loss")
        assert all(torch.equal(weights(cut)[name], tensor) for name, tensor in weights(whole).items())


def test_what_failed_is_tried_again_when_asked(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = sweep(world, tmp_path / "out", "lr=5e-3,2e-2")
    (tmp_path / "out/trials/0000/last").mkdir(parents=True)  # no checkpoint
    figures = sweep_run(given)
    assert (figures["finished"], figures["failed"]) == (1, 1)
    (tmp_path / "out/trials/0000/last").rmdir()
    assert sweep_run(given)["failed"] == 1
    capfd.readouterr()
    assert sweep_run(dataclasses.replace(given, retry_failed=True))["finished"] == 2
    err = capfd.readouterr().err
    assert "1 failed trial to try again" in err
    assert "trial 0 (lr=0.005)" in err
    assert "trial 1 " not in err


def test_two_processes_share_the_trials(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3,5e-3,2e-2,4e-2", "projector=linear,mlp", epochs=4)
    words = (*command(given), "--json")
    with started(*words) as one, started(*words) as other:
        processes = (one, other)
        ended = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    begun = [re.findall(r"^trial (\d+) .*: begins", err, re.MULTILINE) for _, err in ended]
    assert all(begun), begun
    assert sorted(map(int, begun[0] + begun[1])) == list(range(8))
    last = max(json.loads(out.splitlines()[-1])["finished"] for out, _ in ended)
    assert last == 8
    assert [line["state"] for line in results(tmp_path / "out").values()] == ["finished"] * 8


@pytest.mark.parametrize("together", [1, "auto"])
def test_pruning_saves_the_steps_of_what_is_hopeless(world: Path, tmp_path: Path, together: Any) -> None:
    rates = "lr=1e-2,1.5e-2,2e-2,2.5e-2,3e-2,1e-7"
    figures = sweep_run(sweep(world, tmp_path / "out", rates, prune="median", together=together))
    assert (figures["finished"], figures["pruned"]) == (5, 1)
    assert results(tmp_path / "out")[5]["state"] == "pruned"
    assert steps_of(tmp_path / "out") == [[0, 4, 8, 12]] * 5 + [[0, 4]]


def test_ranges_and_trials_that_train_together(world: Path, tmp_path: Path) -> None:
    given = sweep(
        world, tmp_path / "out", "lr=1e-3..1e-1:log", "projector=linear,mlp", "seed=0,1", trials=3, together=3
    )
    assert sweep_run(given)["finished"] == 6
    lines = list(results(tmp_path / "out").values())
    points = collections.Counter((line["lr"], line["projector"]) for line in lines)
    assert list(points.values()) == [2, 2, 2]
    assert all(1e-3 <= line["lr"] <= 1e-1 for line in lines)
    alone = sweep(
        world,
        tmp_path / "alone",
        f"lr={lines[0]['lr']!r}",
        projector=lines[0]["projector"],
        seed=lines[0]["seed"],
    )
    assert sweep_run(alone)["eval_loss"] == pytest.approx(lines[0]["eval_loss"], rel=1e-4)


def test_what_runs_of_a_kind_take_is_predicted_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = []

    def predict(given: RunConfig, *arguments: Any) -> Prediction:
        kinds.append(given.projector)
        return measure(given, *arguments)

    measure = cost_prediction.predict
    monkeypatch.setattr(training_run, "predict", predict)
    sweep_run(sweep(world, tmp_path / "out", "lr=1e-3,2e-3,4e-3", "projector=linear,mlp", max_steps=1))
    assert kinds == ["linear", "mlp"]


def test_auto_trains_as_many_together_as_measured(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gains = {(1, 2): 1.5, (2, 4): 1.07}
    asked: list[tuple[int, int]] = []

    def gain(step: Step, few: int, more: int) -> float:
        before = torch.get_rng_state()
        assert measure(step, few, more) > 0  # as it is measured, which must change nothing
        assert torch.equal(torch.get_rng_state(), before)
        asked.append((few, more))
        return gains[few, more]

    measure = Step.gain
    monkeypatch.setattr(Step, "gain", gain)
    space = ("lr=5e-3,1e-2,2e-2", "projector=linear,mlp")
    auto, alone = (sweep(world, tmp_path / name, *space) for name in ("auto", "alone"))
    assert sweep_run(dataclasses.replace(auto, together="auto"))["finished"] == 6
    err = capfd.readouterr().err
    assert asked == [*gains]
    assert "trains 2 trials at a time, as measured here: 1.5 times as fast as one by one" in err
    assert re.findall(r"^(\d+): finished", err, re.M) == [f"{trial:04}" for trial in range(6)]
    sweep_run(alone)
    for trial, line in results(tmp_path / "alone").items():
        again = results(tmp_path / "auto")[trial]
        assert again["eval_loss"] == pytest.approx(line["eval_loss"], rel=1e-5)
        assert curve(tmp_path / "auto" / line["folder"]) == pytest.approx(
            curve(tmp_path / "alone" / line["folder"]), rel=1e-5
        )
    asked.clear()
    sweep_run(dataclasses.replace(auto, together="auto"))  # nothing is left to measure for
    assert asked == []


def test_auto_goes_on_with_another_number_after_a_kill(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    space = ("lr=5e-3,2e-2", "projector=linear,mlp")
    flags: dict[str, Any] = {"epochs": 2, "save_every": 4, "keep": 1000}
    given = sweep(world, tmp_path / "cut", *space, **flags, together="auto")
    with started(*command(given)) as process:
        wait_until(process, (tmp_path / "cut/trials/0000/step-00000008").exists)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    monkeypatch.setattr(Step, "gain", lambda step, few, more: 1.5 if more == 2 else 1.0)
    figures = sweep_run(dataclasses.replace(given, resume=True))
    assert (figures["finished"], figures["interrupted"]) == (4, 0)
    err = capfd.readouterr().err
    assert "trains 2 trials at a time" in err
    assert re.search(r"continued at step \d+", err)
    assert steps_of(given.out) == [list(range(0, 25, 4))] * 4
    alone = sweep(world, tmp_path / "alone", *space, **flags)
    sweep_run(alone)
    for trial, line in results(alone.out).items():
        assert results(given.out)[trial]["eval_loss"] == pytest.approx(line["eval_loss"], rel=1e-4)


def test_auto_leaves_to_themselves_what_others_results_steer(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3..1e-1:log", trials=2, together="auto", max_steps=1)
    assert sweep_run(given)["finished"] == 2
    err = capfd.readouterr().err
    assert "--together auto trains one by one here" in err
    assert "as measured" not in err
    refused = call(*command(sweep(world, tmp_path / "out", "lr=1,2")), "--together", "many", code=2)
    assert "many" in refused.err


def test_more_runs_than_fit_a_pass_are_not_measured(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=1,2", micro_tokens=400)
    step = Step(given, TrainingResources(given))
    assert 200 < step.tokens <= 400
    assert step.seconds(1) > 0
    assert step.gain(1, 2) == 0


@pytest.mark.slow  # two minutes; one of the last seven runs failed, for a reason not found yet
def test_a_cluster_that_loses_a_node_finishes_the_sweep(world: Path, tmp_path: Path) -> None:
    given = sweep(world, tmp_path / "out", "lr=5e-3,2e-2", "projector=linear,mlp", epochs=20, save_every=4)
    with ray_cluster() as (address, _, other):
        call = (*command(dataclasses.replace(given, ray=address)), "--json")
        with started(*call, **ACCESS) as process:
            wait_until(process, (tmp_path / "out/trials/0000/last").exists)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert err.splitlines()[-1] == "interrupted; the same command continues where it stopped"
        assert "stopping after this step" in err
        with started(*call, **ACCESS) as process:

            def at_stake() -> list[str]:
                """Trials that run on the other node, and have something to lose."""
                locks = (tmp_path / "out/trials").glob("*/trial.lock")
                held = [lock.parent for lock in locks if holder(lock) in other.processes()]
                return [trial.name for trial in held if list(trial.glob("step-*"))]

            lost, *_ = wait_until(process, at_stake)
            other.kill()
            out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "2 workers of 1 CPU core" in err
    assert "a worker died; another continues its trial" in err
    assert json.loads(out.splitlines()[-1])["finished"] == 4
    assert re.search(rf"trial {int(lost)} .*: goes on", err)
    assert steps_of(tmp_path / "out") == [list(range(0, 241, 4))] * 4


def test_weights_and_biases_names_a_trial_by_its_point(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = sweep(world, tmp_path / "rates", "lr=1e-3,2e-3", "projector=mlp", max_steps=1, together=2)
    sweep_run(dataclasses.replace(given, report_to=("wandb",)))
    for trial, lr in ((0, b"0.001"), (1, b"0.002")):
        (log,) = (tmp_path / f"rates/trials/{trial:04d}/wandb").glob("offline-run-*/*.wandb")
        names = re.findall(rb"rates lr=([0-9.]+) projector=mlp", log.read_bytes())
        assert set(names) == {lr}


def test_an_error_that_nobody_foresaw_is_its_trial_s_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def metric_writers(*arguments: Any) -> MetricWriters:
        if arguments[-1].endswith("lr=0.001"):
            raise ValueError("no such thing")
        return MetricWriters(*arguments)

    monkeypatch.setattr(training_run, "MetricWriters", metric_writers)
    ended = sweep_run(sweep(world, tmp_path / "out", "lr=1e-3,2e-3", max_steps=1))
    assert (ended["failed"], ended["finished"]) == (1, 1)
    err = capfd.readouterr().err
    assert "trial 0 (lr=0.001): failed: ValueError: no such thing\n" in err
    assert "in metric_writers\n" in err  # where it was raised
    assert "1 trial failed; --retry-failed tries again\n" in err


def test_to_be_stopped_while_the_model_loads_is_no_death(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = sweep(world, tmp_path / "out", "lr=1e-3", max_steps=1)

    def stopped(config: SweepConfig, study: Study) -> TrainingResources:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trials, "opened", stopped)
        for _ in range(MOST_DEATHS + 1):
            with pytest.raises(KeyboardInterrupt):
                sweep_run(given)
    assert sweep_run(given)["finished"] == 1
