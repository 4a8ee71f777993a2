"""`torchrun ... -m train run`: as many processes as one likes, and always the curve of one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llava_core.shards.writer import ShardWriter
from tests.support.commands import Ended, holder, started, wait_until
from tests.support.runs import config, curve, flags_of, weights
from tests.support.shards import header, outcome
from train.config import RunConfig
from train.distributed import ProcessGroup
from train.run import run as train_run

GREEDY = """
import os
import torch

class Greedy(torch.nn.Linear):
    def forward(self, features):
        fit = int(os.environ["FIT"])
        trains = torch.is_grad_enabled() and features.any()  # operations are counted on zeros
        evaluates = "EVALUATIONS" in os.environ and features.any() and not trains
        if os.environ["RANK"] == "1" and len(features) > fit and (trains or fit < 0 or evaluates):
            torch.empty(2**50, dtype=torch.uint8)
        return super().forward(features)
"""
"""A projector whose steps, and EVALUATIONS if that is set, find no memory for more than FIT samples on one
rank; below 0 nothing does."""


def torchrun(
    processes: int, given: RunConfig, **environment: Any
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return started(*launcher, "-m", "train", "run", *flags_of(given), **environment)


def greedy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    (tmp_path / "greedy.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(tmp_path)
    return config(world, tmp_path / "many", projector="greedy:Greedy", tune="lora", max_steps=4)


def ended(process: subprocess.Popen[str], code: int) -> Ended:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert "/train/" not in err, err  # in no traceback; torchrun shows its own whenever a process fails
    return Ended(process.returncode, out, err)


def ranks(process: subprocess.Popen[str], out: Path) -> list[int]:
    """Process numbers of a run once it writes checkpoints, the main rank first."""
    wait_until(process, lambda: list(out.glob("step-*")))
    main = holder(out.with_name(out.name + ".lock"))
    assert main
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [main, *(int(child) for child in children if int(child) != main)]


def assert_same_run(one: Path, other: Path) -> None:
    for key in ("loss", "eval_loss"):
        assert curve(other, key) == pytest.approx(curve(one, key), rel=1e-6), key
    assert curve(other, "eval_grounding_gap") == pytest.approx(curve(one, "eval_grounding_gap"), abs=1e-5)
    expected, got = weights(one), weights(other)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("processes", "batch_size"),
    [
        pytest.param(2, 5, id="two processes, a last step of three samples"),
        pytest.param(4, 3, id="four processes, three samples a step", marks=pytest.mark.slow),
    ],
)
def test_many_processes_give_the_curve_of_one(
    world: Path, tmp_path: Path, processes: int, batch_size: int
) -> None:
    given = config(world, tmp_path / "many", batch_size=batch_size)
    with torchrun(processes, given) as process:
        err = ended(process, code=0).err
    assert err.count("finished") == err.count("frozen: ") == 1, err
    assert not (tmp_path / "many.lock").exists()
    train_run(dataclasses.replace(given, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize("tune", ["lora", "llm"])
def test_stage_2_in_two_processes_is_that_of_one(
    world: Path, tmp_path: Path, tune: Literal["lora", "llm"]
) -> None:
    """And continues in two from one checkpoint, which the main rank alone reads."""
    given = config(world, tmp_path / "many", batch_size=5, tune=tune, lr_llm=0.005, grad_clip=1.0)
    half = dataclasses.replace(given, save_every=10, keep=9)
    with torchrun(2, half) as process:
        ended(process, code=0)
    train_run(dataclasses.replace(given, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", given.out)
    (given.out / "summary.json").unlink()
    (given.out / "last").unlink()
    (given.out / "last").symlink_to("step-00000010")
    with torchrun(2, half) as process:
        ended(process, code=0)
    assert_same_run(tmp_path / "one", given.out)


def test_dropout_in_two_processes_goes_on_as_it_was(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", tune="lora", lora_dropout=0.3, lr_llm=0.005, max_steps=8)
    given = dataclasses.replace(given, save_every=4, keep=9)
    with torchrun(2, given) as process:
        ended(process, code=0)
    whole = curve(given.out)
    (given.out / "summary.json").unlink()
    (given.out / "last").unlink()
    (given.out / "last").symlink_to("step-00000004")
    with torchrun(2, given) as process:
        ended(process, code=0)
    assert curve(given.out) == whole


def test_a_stop_on_one_rank_stops_all_and_one_process_continues(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "many", epochs=20)
    with torchrun(2, given) as process:
        os.kill(ranks(process, given.out)[1], signal.SIGTERM)
        err = ended(process, code=1).err  # torchrun's own
    assert err.count("interrupted; the same command continues") == 1, err
    assert err.count("exitcode  : 130") == 2, err
    last = (given.out / "last").resolve().name
    assert last == f"step-{max(curve(given.out)):08d}"
    assert last != "step-00000240"
    train_run(given)
    train_run(dataclasses.replace(given, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", given.out)


@pytest.mark.slow
def test_killed_with_two_processes_continued_with_four(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "many", epochs=40)
    with torchrun(2, given) as process:
        os.kill(ranks(process, given.out)[1], signal.SIGKILL)
        assert "error: another process of this run has ended" in ended(process, code=1).err
    assert not (given.out / "summary.json").exists()
    with torchrun(4, given) as process:
        assert "continued at step" in ended(process, code=0).err
    train_run(dataclasses.replace(given, out=tmp_path / "one"))
    assert_same_run(tmp_path / "one", given.out)


def test_what_one_rank_cannot_do_ends_all_with_one_line(world: Path, tmp_path: Path) -> None:
    """One sample is too long for --micro-tokens, and only one rank meets it."""
    with ShardWriter(tmp_path / "long/d.h5", header([*["short"] * 11, "long" * 20])) as writer:
        writer.write([outcome(row) for row in range(12)])
        writer.finish()
    given = config(world, tmp_path / "run", features=tmp_path / "long", eval_features=None, micro_tokens=100)
    with torchrun(2, given) as process:
        err = ended(process, code=1).err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert errors[0].startswith("error: a sample has too many tokens"), err
    assert "  traceback : a sample has too many tokens" in err, err


def test_memory_that_one_rank_lacks_shortens_its_passes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's own error, with adapters, whose gradients of a pass begun are forgotten, too."""
    given = greedy(world, tmp_path, monkeypatch)
    with torchrun(2, given, FIT=1, PYTHONPATH=tmp_path) as process:
        assert "no room on cpu" not in ended(process, code=0).err  # the other rank is silent
    enough = dataclasses.replace(given, out=tmp_path / "enough")
    with torchrun(2, enough, FIT=9, PYTHONPATH=tmp_path) as process:
        ended(process, code=0)
    assert_same_run(enough.out, given.out)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"FIT": 0}, "error: the memory of cpu is too small for one sample; got "),
        ({"FIT": -1}, "error: the projector greedy:Greedy fails; got "),
        ({"FIT": 0, "EVALUATIONS": 1}, "error: the device's memory is full; lower --micro-tokens"),
    ],
)
def test_memory_that_one_rank_lacks_altogether_ends_all_with_one_line(
    world: Path, tmp_path: Path, given: dict[str, int], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torchrun(2, greedy(world, tmp_path, monkeypatch), **given, PYTHONPATH=tmp_path) as process:
        err = ended(process, code=1).err
    errors = [each for each in err.splitlines() if each.startswith("error: ")]
    assert len(errors) == 1, err
    assert errors[0].startswith(line), err


def test_shards_are_whole_even_and_level() -> None:
    costs = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    shards = [ProcessGroup(rank, 4).shard(range(11), costs.__getitem__) for rank in range(4)]
    assert sorted(itertools.chain(*shards)) == list(range(11))
    assert sorted(map(len, shards)) == [2, 3, 3, 3]
    assert [sum(costs[i] for i in shard) for shard in shards] == [14, 10, 10, 10]
    assert [ProcessGroup(rank, 4).shard([7]) for rank in range(4)] == [[7], [], [], []]
    assert ProcessGroup().shard([3, 1, 2], lambda item: item) == [3, 1, 2]
