"""The host gives a device its work and does not wait for it: on torch's meta device no number can be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llava_core.device import Later
from llava_core.language.prompt_and_labels import Example
from tests.support.runs import config
from train.data.samples import Samples
from train.distributed import ProcessGroup
from train.loop import Trainer
from train.model.blocks import as_written
from train.model.loss import token_losses
from train.model.packed_attention import Kernel
from train.resources import TrainingResources
from train.run import run as train_run
from train.run_folder import RunFolder
from train.stop_signal import StopRequest
from train.training_run import TrainingRun

META = torch.device("meta")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """In the place of a GPU's kernel: the samples are known to it alone."""
    repeat = q.shape[1] // k.shape[1]
    return q + k.repeat_interleave(repeat, 1) + v.repeat_interleave(repeat, 1)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the copies to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.count += 1
        return out


@pytest.fixture(params=["projector", "lora"])
def trainer(request: pytest.FixtureRequest, world: Path, tmp_path: Path) -> Iterator[Trainer]:
    """One that is about to make its first step, moved to the meta device."""
    given = config(world, tmp_path / "run", tune=request.param, grad_clip=1.0)
    resources = TrainingResources(given)
    run = TrainingRun(given, RunFolder(given.out, given), resources)
    as_written(resources.llm)
    kernel = Kernel("device", lambda: attend)
    kernel.install()
    resources.llm.model.config._attn_implementation = kernel.interface
    resources.llm.model.to(META)
    run.projector.to(META)
    assert resources.llm.device == META
    yield Trainer({0: run}, resources, resources.packing(150), StopRequest())
    run.writers.close()


def test_a_step_waits_for_nothing(trainer: Trainer) -> None:
    batches = trainer.batches(2)
    for batch in batches:
        rows = len(list(trainer.packing.rows(batch.to(META), [trainer.runs[0].visual])))
        assert rows > 1
        with Copies() as copies:  # type: ignore[no-untyped-call]
            losses = trainer.train_step(batch)
        assert losses.device == META
        assert copies.count == 1 + 2 * rows  # features; of each row its tokens, and where its samples begin
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        losses.tolist()


def test_the_exchange_of_several_processes_waits_for_nothing() -> None:
    """In a group whose other rank is not there: the sums are this one's."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        means = [torch.ones(2, 3, device=META), torch.ones((), device=META)]
        assert ProcessGroup(0, 2).exchange(means, 4.0, (3, 2**40 + 1), None) == [3, 2**40 + 1]
    finally:
        torch.distributed.destroy_process_group()


def test_held_out_losses_wait_for_nothing(trainer: Trainer) -> None:
    run = trainer.runs[0]
    assert run.held_out is not None
    batch = run.held_out.batch([0, 1, 2], epoch=0)
    with torch.no_grad():
        for row in trainer.packing.rows(batch.to(META), [run.visual]):
            losses = token_losses(run.llm, run.projector, row)
            assert losses.device == META
            assert losses.shape == (sum(len(pack.targets) for _, pack in row.packs),)


def test_losses_are_read_when_the_next_ones_are_on_their_way(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Recorded(Later):
        def __init__(self, values: torch.Tensor) -> None:
            super().__init__(values)
            self.number = len([event for event in events if event.startswith("given")])
            events.append(f"given {self.number}")

        def read(self) -> torch.Tensor:
            events.append(f"read {self.number}")
            return super().read()

    monkeypatch.setattr("train.loop.Later", Recorded)
    train_run(config(world, tmp_path / "run", max_steps=4, log_every=3, eval_features=None))
    late = ["given 0", "given 1", "read 0", "given 2", "read 1", "read 2", "given 3", "read 3"]
    assert events == late  # at once in the third step, which is logged, and in the last
    events.clear()
    monkeypatch.setattr("train.evaluate.Later", Recorded)
    train_run(config(world, tmp_path / "other", max_steps=1, batch_size=2, eval_samples=4))
    assert events[:6] == ["given 0", "given 1", "read 0", "given 2", "read 1", "given 3"]


def test_held_out_words_become_tokens_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    example = Samples.example

    def counted(samples: Samples, index: int, epoch: int) -> Example:
        if "example" in vars(samples):
            asked.append(index)
        return example(samples, index, epoch)

    monkeypatch.setattr(Samples, "example", counted)
    train_run(config(world, tmp_path / "run", max_steps=3, batch_size=2, eval_every=1, eval_samples=4))
    assert sorted(asked) == [0, 1, 2, 3]
