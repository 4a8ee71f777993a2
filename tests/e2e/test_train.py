"""`train`: killed, interrupted, continued, and always the same curve."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.language.model import LanguageModel
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.shards.dialogue import turns_to_text
from llava_core.shards.writer import ShardWriter
from tests.support.commands import ENVIRONMENT, call, holder, run, started, wait_until
from tests.support.language_models import write_language_model
from tests.support.runs import LOSS_CURVE, config, curve, flags_of, weights
from tests.support.shards import TOKENS, WIDTH, header, outcome, write_shard
from train.config import EvalConfig
from train.cost_prediction import run as plan_run
from train.data.packing import Row
from train.evaluate import run as evaluate_run
from train.loop import Trainer
from train.metric_writers import has_key
from train.model.loss import packed_losses
from train.resources import TrainingResources
from train.run import run as train_run
from train.run_folder import RunFolder
from train.stop_signal import StopRequest
from train.training_run import TrainingRun


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 24 steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_run(config(world, out))
    return out


def test_a_run_learns_and_leaves_a_whole_checkpoint(world: Path, whole: Path) -> None:
    losses, held_out = curve(whole), curve(whole, "eval_loss")
    assert list(losses) == list(range(1, 25))
    assert list(held_out) == [0, 10, 20, 24]
    spoken = curve(whole, "eval_captions")
    assert [len(lines) for lines in spoken.values()] == [4, 4, 4, 10]  # type: ignore[arg-type]
    for name in ("eval_loss", "eval_perplexity", "eval_grounding_gap"):
        low, high = curve(whole, f"{name}_low"), curve(whole, f"{name}_high")
        assert all(low[step] < value < high[step] for step, value in curve(whole, name).items())
    assert held_out[24] < 0.95 * held_out[0]
    rates = curve(whole, "lr")
    assert max(rates.values()) == rates[2] == 0.02
    assert rates[24] < 0.001
    files = {
        "SHA256SUMS",
        "model.safetensors",
        "config.json",
        "training_config.yaml",
        "metrics.json",
        "README.md",
        "state.pt",
    }
    assert {path.name for path in (whole / "last").iterdir()} == files
    checkpoint = load_checkpoint(whole / "last")
    assert checkpoint.metrics["step"] == 24
    assert checkpoint.training["lr"] == 0.02
    assert checkpoint.provenance.language_model.hidden == 32
    assert sorted(path.name for path in whole.glob("step-*")) == ["step-00000020", "step-00000024"]


def test_the_golden_curve(whole: Path) -> None:
    """The same numbers as when they were written down: a refactor must not move them."""
    now = [round(loss, 6) for loss in curve(whole).values()]
    assert now == pytest.approx(json.loads(LOSS_CURVE.read_text()), rel=1e-4)


def test_eval_measures_what_the_run_measured(world: Path, whole: Path) -> None:
    figures = evaluate_run(
        EvalConfig(checkpoint=whole / "last", features=world / "held-out", llm=world / "llm")
    )
    assert figures["loss"] == pytest.approx(curve(whole, "eval_loss")[24], rel=1e-6)
    assert figures["grounding_gap"] == pytest.approx(figures["loss_shuffled"] - figures["loss"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(torch.tensor(figures["loss"]).exp().item(), rel=1e-5)
    assert figures["samples"] == 10


def test_captions_of_one_picture_are_not_paired(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each picture three times, one after the other, gives the gap of each once, and is no surer of it."""
    figures = []
    for name, times, pictures in (("once", 1, 8), ("thrice", 3, 8), ("one", 4, 1)):
        rows = [picture for picture in range(pictures) for _ in range(times)]
        texts = [turns_to_text([("问", f"红{'a blue square'[:own]}")]) for own in rows]
        made = dataclasses.replace(header(texts), conversations=True)
        with ShardWriter(tmp_path / name / "a.h5", made) as writer:
            writer.write([dataclasses.replace(outcome(own), row=k) for k, own in enumerate(rows)])
            writer.finish()
        config = EvalConfig(checkpoint=whole / "last", features=tmp_path / name, llm=world / "llm")
        figures.append(evaluate_run(config))
    once, thrice, one = figures
    assert (once["samples"], thrice["samples"], once["pictures"], thrice["pictures"]) == (8, 24, 8, 8)
    for key in ("loss", "perplexity", "grounding_gap"):
        for end in ("", "_low", "_high"):
            assert thrice[key + end] == pytest.approx(once[key + end], rel=1e-4), key + end
        assert once[f"{key}_low"] < once[key] < once[f"{key}_high"]
    assert (one["grounding_gap"], one["grounding_gap_low"], one["loss_low"]) == (None, None, None)
    out, err = capsys.readouterr()
    assert f"{once['loss']:.4f} ({once['loss_low']:.4f} to {once['loss_high']:.4f})" in out
    assert "grounding gap not defined: all held-out rows show one image" in err


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_runs_follow_each_other_in_one_process(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook: other settings each time, compiled too, and in a thread, which handles no signal."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="aot_eager"))
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    short: dict[str, Any] = {"compile": "on", "max_steps": 1, "eval_features": None}
    train_run(config(world, tmp_path / "other", batch_size=2, projector="mlp", **short))
    train_run(config(world, tmp_path / "on", **short))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_run, config(world, tmp_path / "thread")).result()
    assert curve(tmp_path / "thread") == curve(whole)
    assert curve(tmp_path / "on") == pytest.approx({1: curve(whole)[1]}, rel=1e-4)
    assert handlers == [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_finished_run_is_left_alone(world: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (whole / "last/model.safetensors").stat().st_mtime_ns
    train_run(config(world, whole))
    assert "nothing to do" in capfd.readouterr().err
    assert (whole / "last/model.safetensors").stat().st_mtime_ns == before


def assert_near(out: Path, whole: Path) -> None:
    """The losses of two runs are those of the same steps, but for the order of sums."""
    expected = curve(whole)
    for step, loss in curve(out).items():
        assert loss == pytest.approx(expected[step], rel=1e-4), step


def test_splitting_a_step_changes_nothing(world: Path, whole: Path, tmp_path: Path) -> None:
    train_run(config(world, tmp_path / "run", micro_tokens=150))
    assert_near(tmp_path / "run", whole)


def test_passes_shrink_until_the_device_has_room(
    world: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A GPU says that its memory is full, here after some of a step's gradients."""
    room, passes = 150, []

    def packed(llm: LanguageModel, projectors: Any, row: Row) -> list[torch.Tensor]:
        passes.append(len(row.positions))
        if len(passes) == 4 or (len(passes) > 4 and len(row.positions) > room):  # within the second step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return packed_losses(llm, projectors, row)

    monkeypatch.setattr("train.loop.packed_losses", packed)
    train_run(config(world, tmp_path / "run", micro_tokens=300, eval_features=None))
    assert_near(tmp_path / "run", whole)
    said = capfd.readouterr().err
    assert re.search(r"no room on cpu for 2\d\d tokens in a pass: now --micro-tokens 1\d\d", said)
    assert max(passes) > 150 >= max(passes[-5:])
    room = 10
    with pytest.raises(LlavaError, match=r"cpu is too small for one sample; got \d+ tokens; give --gr"):
        train_run(config(world, tmp_path / "small", eval_features=None))


def test_gradients_of_a_pass_that_did_not_fit_are_forgotten(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has yet to be added to that of a copy in fp32, whose memory is what was missing."""
    for module in ("llava_core.language.load", "train.cost_prediction"):
        monkeypatch.setattr(f"{module}.default_dtype", lambda device: torch.bfloat16)
    given = config(world, tmp_path / "run", tune="llm")
    resources = TrainingResources(given)
    run = TrainingRun(given, RunFolder(given.out, given), resources)
    trainer = Trainer({0: run}, resources, resources.packing(1000), StopRequest())
    with contextlib.closing(trainer.batches(1)) as batches:
        batch = next(batches)
    losses, zeros, full = [torch.zeros(())], torch.zeros_like, iter([False, False, True])

    def zeros_like(*arguments: Any, **more: Any) -> torch.Tensor:
        if not more and next(full, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return zeros(*arguments, **more)

    monkeypatch.setattr("torch.zeros_like", zeros_like)
    assert not trainer.backward(batch, losses)
    trainer.take_fewer_tokens(batch)
    assert all(parameter.grad is None for parameter in [*resources.llm.model.parameters(), *run.parameters])
    assert trainer.backward(batch, losses)
    run.writers.close()


def test_passes_are_as_long_as_the_free_ram_allows(
    world: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for module in ("cost_prediction", "run"):
        monkeypatch.setattr(f"train.{module}.free_memory", lambda device: 900_000)
    planned = plan_run(config(world, tmp_path / "plan"))
    assert 50 < planned["micro_tokens"] < planned["tokens_per_step"]
    train_run(config(world, tmp_path / "run", eval_features=None))
    assert re.search(r"--micro-tokens \d+, since 878.9 KiB are free", capfd.readouterr().err)
    assert_near(tmp_path / "run", whole)


@pytest.mark.parametrize("tune", ["projector", "lora", "llm"])
def test_passes_leave_ram_for_optimizers_and_features(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: Any
) -> None:
    free = 2_400_000
    monkeypatch.setattr("train.cost_prediction.free_memory", lambda device: free)
    planned = plan_run(config(world, tmp_path / "plan", tune=tune, batch_size=16, resident="ram"))
    assert 147 < planned["micro_tokens"] < planned["tokens_per_step"]
    memory = planned["memory"]
    assert sum(memory.values()) - memory["process"] - memory["logits"] <= 0.75 * free
    assert memory["features_kept"] > 0


def test_a_longer_sample_than_the_memory_was_measured_by_has_a_pass_of_its_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes were shortened by other samples, in the plan or beside a full GPU; the flag allows this one."""
    captions = ["红色的圆形" * 20] * 4
    with ShardWriter(tmp_path / "long/a.h5", header(captions)) as writer:
        writer.write([outcome(row) for row in range(4)])
        writer.finish()
    given = config(world, tmp_path / "run", eval_features=tmp_path / "long", max_steps=2)
    full = iter([True])

    def packed(*arguments: Any) -> list[torch.Tensor]:
        if next(full, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return packed_losses(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("train.loop.packed_losses", packed)
        loss = train_run(given)["eval_loss"]
    monkeypatch.setattr("train.cost_prediction.free_memory", lambda device: 0)
    assert train_run(dataclasses.replace(given, out=tmp_path / "low"))["eval_loss"] == pytest.approx(loss)


def test_shuffled_pictures_cost_something_once_they_matter(world: Path, tmp_path: Path) -> None:
    """Trained on eight rows until it knows them by their pictures, the gap is wide; untrained, it is none."""
    write_shard(tmp_path / "few/d.h5", rows=8)
    flags: dict[str, Any] = {
        "features": tmp_path / "few",
        "eval_features": tmp_path / "few",
        "projector": "mlp",
    }
    train_run(config(world, tmp_path / "run", **flags, epochs=150, eval_every=300, save_every=300))
    gaps = curve(tmp_path / "run", "eval_grounding_gap")
    assert abs(gaps[0]) < 0.05
    assert gaps[300] > 0.3


@pytest.fixture(scope="module")
def long(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 240 steps."""
    out = tmp_path_factory.mktemp("runs") / "long"
    train_run(config(world, out, epochs=20))
    return out


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_resumed_is_bit_equal_to_uninterrupted(world: Path, long: Path, tmp_path: Path, signum: int) -> None:
    given = config(world, tmp_path / "cut", epochs=20, keep=1000)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, (tmp_path / "cut/step-00000030").exists)
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=120)
    if signum != signal.SIGKILL:
        assert process.returncode == 130, err
        assert "the same command continues" in err
    assert not (tmp_path / "cut/summary.json").exists()
    call("train", "run", *flags_of(given), "--resume")
    assert curve(tmp_path / "cut") == curve(long)
    assert curve(tmp_path / "cut", "eval_loss") == curve(long, "eval_loss")
    cut, whole = weights(tmp_path / "cut"), weights(long)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    states = [torch.load(out / "last/state.pt", weights_only=True) for out in (tmp_path / "cut", long)]
    first, second = (state["optimizer"]["state"][0]["exp_avg_sq"] for state in states)
    assert torch.equal(first, second)


def test_a_dry_run_touches_nothing(world: Path, tmp_path: Path) -> None:
    figures = train_run(config(world, tmp_path / "run", dry_run=True))
    assert (figures["samples"], figures["steps"]) == (48, 24)
    assert not (tmp_path / "run").exists()


def test_a_plan_refuses_what_the_run_would(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="a sample has too many tokens"):
        plan_run(config(world, tmp_path / "run", micro_tokens=20))
    captions = ["红"] * 600
    captions[301] = "红色的圆形" * 20  # between those whose words are counted
    with ShardWriter(tmp_path / "long/a.h5", header(captions)) as writer:
        writer.write([outcome(row) for row in range(600)])
        writer.finish()
    with pytest.raises(LlavaError, match="a sample has too many tokens"):
        plan_run(config(world, tmp_path / "run", features=tmp_path / "long", micro_tokens=80))
    assert plan_run(config(world, tmp_path / "run", features=tmp_path / "long"))["samples"] == 600


def test_a_plan_needs_no_weights_and_is_compared_with_the_run(world: Path, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    for path in (world / "llm").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / "llm")
    given = config(world, tmp_path / "run", max_steps=4)
    ended = call("train", "plan", *flags_of(dataclasses.replace(given, llm=tmp_path / "llm")), "--json")
    planned = ended.summary
    assert (planned["samples"], planned["steps"]) == (48, 4)
    assert "matmul rate of this machine, measured" in ended.out
    assert not (tmp_path / "run").exists()
    ended = call("train", "run", *flags_of(given), "--json")
    assert ended.summary["planned_memory_bytes"] == pytest.approx(sum(planned["memory"].values()), rel=0.1)
    assert ended.summary["steps_per_s"] > 0
    assert "planned" in ended.err
    last = read_json_lines(tmp_path / "run/metrics.jsonl")[-2]
    assert 0 < last["mfu"] < 1
    assert last["memory_bytes"] > 1e8


def test_a_plan_counts_what_is_read_ahead_in_an_evaluation(world: Path, tmp_path: Path) -> None:
    """All held-out rows here, each with its own picture and with another, beside the next steps'."""
    plan = functools.partial(config, world, tmp_path / "run", resident="disk", eval_samples=6)
    alone, both = (plan_run(given)["memory"] for given in (plan(eval_features=None), plan()))
    more = both["features_read_ahead"] - alone["features_read_ahead"]
    assert more == 2 * 6 * TOKENS * WIDTH * 2


@pytest.mark.parametrize(("quiet_seconds", "told"), [(1e9, [1]), (0, range(1, 12))])
def test_a_log_in_a_file_shows_that_the_run_is_alive(
    quiet_seconds: float, told: Sequence[int], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its first logged step at once, and then now and then; and by answers below the true captions."""
    monkeypatch.setattr("train.loop.QUIET_SECONDS", quiet_seconds)
    ended = call("train", "run", *flags_of(config(world, tmp_path / "run", epochs=1)))
    lines = ended.err.splitlines()
    alive = [line for line in lines if re.match(r"step \d+ of 12: loss .* samples/s.* left", line)]
    assert [int(line.split()[1]) for line in alive] == list(told)
    at = next(k for k, line in enumerate(lines) if line.startswith("step 0: "))
    assert lines[at].endswith(") nats per token")
    assert lines[at + 1].startswith("nothing has been learnt yet: ")
    assert sum(line.startswith("nothing has been learnt yet") for line in lines) == 1
    assert lines[at + 2] == "  c.h5:0"
    assert lines[at + 3].split() == ["truth:", "红色的圆形0"]
    assert lines[at + 4].startswith("    answer: ")


def test_reports_go_where_asked(world: Path, tmp_path: Path) -> None:
    train_run(config(world, tmp_path / "run", max_steps=3, report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    told = {name for line in lines[1:] for name, value in line.items() if isinstance(value, (int, float))}
    assert {"loss", "mfu", "eval_loss", "memory_bytes"} <= told
    tags = set(events.Tags()["scalars"])
    shown = {tag.partition("/")[2] for tag in tags}
    assert shown == {name.removeprefix("eval_") for name in told} - {"step"}
    assert {tag.partition("/")[0] for tag in tags} == {"eval", "train", "uncertainty", "utilisation"}
    assert {"eval/loss", "train/loss", "train/lr", "uncertainty/loss_low", "utilisation/mfu"} <= tags
    spoken = events.Tensors("answers/text_summary")
    assert [event.step for event in spoken] == [0, 3]
    assert (
        f"truth: {lines[1]['eval_captions'][0]['written']}" in spoken[0].tensor_proto.string_val[0].decode()
    )
    (setup,) = events.Tensors("setup/text_summary")
    assert "- attention: per-sample-cpu\n" in setup.tensor_proto.string_val[0].decode()


def test_wandb_stays_offline_without_a_key(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if told to be online, where it would ask for the key; and it gets all that metrics.jsonl gets."""
    monkeypatch.delitem(ENVIRONMENT, "WANDB_API_KEY", raising=False)
    monkeypatch.setitem(ENVIRONMENT, "NETRC", str(tmp_path / "none"))
    monkeypatch.setitem(ENVIRONMENT, "WANDB_MODE", "online")
    ended = run(
        "train", "run", *flags_of(config(world, tmp_path / "run", max_steps=2)), "--report-to", "wandb"
    )
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name in ("mfu", "memory_bytes", "eval_grounding_gap", "eval_captions"):
        assert name.encode() in content, ended.err


def test_a_key_is_one_that_wandb_finds_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert has_key()


def test_bad_input_is_one_clear_line(world: Path, whole: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run", "--llm", world / "llm")
    missing = call("train", "run", *out, "--features", tmp_path / "nowhere", code=1).one_line()
    assert "no feature folder" in missing

    write_shard(tmp_path / "two/a.h5")
    write_shard(tmp_path / "two/b.h5", size=64)
    mixed = call("train", "run", *out, "--features", tmp_path / "two", code=1).one_line()
    assert "a.h5" in mixed
    assert "b.h5" in mixed
    assert "size: 32 vs 64" in mixed

    cut = write_shard(tmp_path / "cut/a.h5", rows=100)
    os.truncate(cut, cut.stat().st_size - 1000)
    assert "truncated" in call("train", "run", *out, "--features", tmp_path / "cut", code=1).one_line()
    assert not (tmp_path / "run").exists()

    other = write_language_model(tmp_path / "other", seed=5)
    wrong = ("--checkpoint", whole / "last", "--features", world / "held-out")
    line = call("train", "eval", *wrong, "--llm", other, code=1).one_line()
    assert "another language model" in line
    assert "llm (weights" in line
    assert "other (weights" in line


def test_folders_of_other_runs_are_safe(world: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match=r"another --lr; expected 0\.02; got 0\.01"):
        train_run(config(world, whole, lr=0.01))
    with pytest.raises(LlavaError, match="no run to resume"):
        train_run(config(world, tmp_path / "new", resume=True))
    with pytest.raises(LlavaError, match=r"give .*best"):
        load_checkpoint(whole)


def test_other_features_are_refused_by_eval(world: Path, whole: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.h5", size=64)
    with pytest.raises(LlavaError, match="size: 32 vs 64"):
        evaluate_run(EvalConfig(checkpoint=whole / "last", features=tmp_path, llm=world / "llm"))


def test_settings_from_a_file(world: Path, tmp_path: Path) -> None:
    settings = {"features": str(world / "features"), "llm": str(world / "llm"), "lr": "1e-3", "max-steps": 2,
                "batch_size": 4, "log_every": 1, "compile": False}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings).replace("'1e-3'", "1e-3"))
    call("train", "run", "-c", tmp_path / "run.yaml", "--out", tmp_path / "run", "--batch-size", 3)
    recorded = yaml.safe_load((tmp_path / "run/training_config.yaml").read_text())
    assert (recorded["lr"], recorded["max_steps"], recorded["batch_size"]) == (0.001, 2, 3)
    assert len(curve(tmp_path / "run")) == 2


def test_a_loss_that_is_no_number_stops_and_says_where(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad/e.h5"
    with ShardWriter(path, header([f"caption {row}" for row in range(70)])) as writer:
        records = [outcome(row) for row in range(70)]
        records[66].features = np.full((TOKENS, WIDTH), np.nan)
        writer.write(records)
        writer.finish()
    with pytest.raises(LlavaError, match=r"the loss is nan at step \d+, learning rate .* rows .*e\.h5:66\b"):
        train_run(config(world, tmp_path / "run", features=path.parent, eval_features=None))
    assert not (tmp_path / "run/last").exists()


def test_more_steps_than_there_are_is_said(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(config(world, tmp_path / "run", epochs=1, max_steps=99, eval_features=None))
    more = "ends with --epochs 1: --max-steps 99 would take --epochs 9"
    assert f"12 steps of 4 on cpu; {more}\n" in capfd.readouterr().err
    plan_run(config(world, tmp_path / "plan", epochs=1, max_steps=99))
    assert more in capfd.readouterr().out
    train_run(config(world, tmp_path / "other", epochs=1, max_steps=2, eval_features=None))
    fewer = "ends with --max-steps 2, after 0.167 of --epochs 1"
    assert f"2 steps of 4 on cpu; {fewer}\n" in capfd.readouterr().err
    plan_run(config(world, tmp_path / "other", epochs=1, max_steps=2, eval_features=None))
    assert fewer in capfd.readouterr().out


def test_a_start_that_failed_leaves_the_folder_free(world: Path, tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no language model folder"):
        train_run(config(world, tmp_path / "run", llm=tmp_path / "typo"))
    with pytest.raises(LlavaError, match="--micro-tokens"):
        train_run(config(world, tmp_path / "run", micro_tokens=40, eval_features=None))
    train_run(config(world, tmp_path / "run", max_steps=2))
    train_run(config(world, tmp_path / "no/such/folder/yet", max_steps=2))


def test_shards_that_have_changed_are_not_resumed_on(world: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "features/a.h5", rows=26)
    given = config(world, tmp_path / "run", features=tmp_path / "features", eval_features=None, epochs=40)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, (tmp_path / "run/last").exists)
    write_shard(tmp_path / "features/b.h5", rows=9, seed=4)
    with pytest.raises(LlavaError, match="the shards have changed since the run"):
        train_run(given)
    (tmp_path / "features/b.h5").unlink()
    train_run(dataclasses.replace(given, micro_tokens=300))


def test_two_processes_never_train_in_one_folder(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", epochs=200)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, lambda: holder(tmp_path / "run.lock") == process.pid)
        assert f"by process {process.pid} on" in call("train", "run", *flags_of(given), code=1).one_line()


@pytest.mark.parametrize(
    "flags", [("--seed", -1), ("--weight-decay", -1), ("--lr", "nan"), ("--max-steps", 0), ("--warmup", 1)]
)
def test_numbers_that_make_no_sense(world: Path, tmp_path: Path, flags: tuple[object, ...]) -> None:
    line = call("train", "run", *flags_of(config(world, tmp_path / "run")), *flags, code=2).one_line()
    assert line.startswith(f"error: {flags[0]}; expected")
