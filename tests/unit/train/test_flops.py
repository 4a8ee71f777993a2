"""The formula of needed operations against what torch counts, on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_core.device import matmul_rate
from llava_core.language.load import load_language_model, outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.projector.projector import Projector, build_projector
from tests.support.language_models import write_language_model
from tests.support.loss import summed_loss
from tests.unit.train.test_loss import VISUAL, WIDTH, a_batch, reference_loss
from train.data.batch import TextCounts
from train.data.packing import pack
from train.flops import Work
from train.model.blocks import as_written
from train.model.packed_model import prepare
from train.throughput import Throughput, progress_line


@pytest.fixture(params=["linear", "mlp", "mlp3x8", "lowrank4"])
def projector(request: pytest.FixtureRequest) -> Projector:
    return build_projector(request.param, WIDTH, 32)


@pytest.fixture
def llm(tmp_path: Path) -> LanguageModel:
    return load_language_model(write_language_model(tmp_path / "llm"))


def test_the_step_makes_the_needed_operations_and_no_others(llm: LanguageModel, projector: Projector) -> None:
    """Exactly, but for attention, which torch does not count on a CPU."""
    prepare(llm)
    as_written(llm)
    batch = a_batch(llm)
    packed = pack(batch.features, batch.features.shape[1], batch.examples)
    with FlopCounterMode(display=False) as counter:
        summed_loss(llm, projector, packed).backward()  # type: ignore[no-untyped-call]
    work = Work.of(llm.model, projector, VISUAL)
    attention = 6 * work.attention * sum(length**2 for length in packed.lengths)
    assert counter.get_total_flops() == work.operations(batch.counts, VISUAL) - attention


def test_a_sample_without_a_picture_takes_its_text_alone(llm: LanguageModel, projector: Projector) -> None:
    prepare(llm)
    as_written(llm)
    whole = a_batch(llm)
    examples = [dataclasses.replace(example, picture=k % 2 == 0) for k, example in enumerate(whole.examples)]
    packed = pack(whole.features[::2], VISUAL, examples)
    with FlopCounterMode(display=False) as counter:
        summed_loss(llm, projector, packed).backward()  # type: ignore[no-untyped-call]
    work = Work.of(llm.model, projector, VISUAL)
    attention = 6 * work.attention * sum(length**2 for length in packed.lengths)
    assert counter.get_total_flops() == work.operations(TextCounts.of(examples), VISUAL) - attention


def test_attention_is_half_of_what_the_eager_one_does(llm: LanguageModel) -> None:
    """Eager attention computes every score and masks those of the future; all else is counted as above."""
    projector = build_projector("linear", WIDTH, 32)
    batch = a_batch(llm)
    packed = pack(batch.features, batch.features.shape[1], batch.examples)
    with FlopCounterMode(display=False) as counter:
        reference_loss(llm, projector, batch).backward()  # type: ignore[no-untyped-call]
    work = Work.of(llm.model, projector, VISUAL)
    attention = 6 * work.attention * sum(length**2 for length in packed.lengths)
    needless_logits = work.head * (len(packed.ids) - len(packed.targets))
    expected = work.operations(batch.counts, VISUAL) + attention + needless_logits
    assert counter.get_total_flops() == expected


def test_the_outline_has_the_same_sizes(llm: LanguageModel, tmp_path: Path) -> None:
    projector = build_projector("linear", WIDTH, 32)
    outline = outline_language_model(tmp_path / "llm")
    assert outline.device.type == "meta"
    assert Work.of(outline.model, projector, VISUAL) == Work.of(llm.model, projector, VISUAL)
    assert outline.eos_ids == llm.eos_ids


def test_the_matmul_rate_is_that_of_some_machine() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, 0.05) < 1e15


def test_neighbours_do_not_slow_the_matmul_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product takes a second by the clock on the wall, a hundredth of one of every thread's time."""
    walls, cpus = itertools.count(), itertools.count()
    monkeypatch.setattr("llava_core.device.time.perf_counter", lambda: float(next(walls)))
    threads = torch.get_num_threads()
    monkeypatch.setattr("llava_core.device.time.process_time", lambda: 0.01 * threads * next(cpus))
    rate = matmul_rate.__wrapped__(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 1024**3 / 0.01)


def test_an_impossible_utilisation_is_said_to_be_one() -> None:
    throughput = Throughput(torch.device("cpu"), matmul_rate=1.0)
    throughput.count(samples=1, tokens=1, operations=10**15)
    metrics = throughput.rates()
    assert metrics["mfu"] is None
    line = progress_line({"loss": 1.0, "lr": 0.1, **metrics})
    assert "MFU unknown (over 100%: the matmul rate was measured too low), waits" in line
    throughput.count(samples=1, tokens=1, operations=0)
    assert "MFU 0%" in progress_line({"loss": 1.0, "lr": 0.1, **throughput.rates()})
