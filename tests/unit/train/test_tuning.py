"""Freeze policies: every trained tensor has the textbook gradient, in short types, too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.tuned_weights import AllWeights, LoraAdapter
from llava_core.projector.projector import build_projector
from llava_core.sha256sums import write_sums
from tests.support.language_models import write_language_model
from tests.unit.train.test_loss import VISUAL, WIDTH, a_batch, a_projector, reference_loss
from train.config import RunConfig
from train.data.packing import Packing
from train.model.loss import packed_losses
from train.model.packed_model import prepare
from train.optimizer import build_optimizers
from train.tuning import Tuning


def policy(**flags: Any) -> RunConfig:
    return RunConfig(features=Path("f"), llm=Path("l"), out=Path("o"), **flags)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("tune", ["lora", "llm"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_packed_equals_per_sample(tmp_path: Path, kind: str, tune: str, recomputes: bool) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", kind))
    batch, projector = a_batch(llm), a_projector(llm)
    tuning = Tuning(policy(tune=tune, lora_rank=3), llm)
    torch.manual_seed(3)
    for parameter in tuning.parameters if tune == "lora" else ():  # B of 0 would hide A's gradient
        parameter.data.normal_(std=0.05)
    parameters = [*projector.parameters(), *tuning.parameters]
    assert all(parameter.requires_grad for parameter in parameters)
    reference = reference_loss(llm, projector, batch)
    reference.backward()  # type: ignore[no-untyped-call]
    expected = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    prepare(llm, recomputes=recomputes)
    rows = list(Packing(100).rows(batch, [VISUAL]))
    assert len(rows) == 3
    total = torch.zeros(())
    for row in rows:
        (loss,) = packed_losses(llm, [projector], row)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    torch.testing.assert_close(total, reference.detach(), rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_short_types_train_in_fp32(tmp_path: Path) -> None:
    """Steps of a thousandth of a weight: bf16 alone would lose them, and sums of many gradients."""
    llm = load_language_model(write_language_model(tmp_path / "llm", "qwen3"), dtype=torch.bfloat16)
    batch, projector = a_batch(llm), build_projector("mlp", WIDTH, llm.hidden)
    prepare(llm)
    config = policy(tune="llm", lr_llm=1e-5, warmup=0.0)
    tuning = Tuning(config, llm)
    (optimizer,) = build_optimizers(config, projector, tuning.parameters)
    assert all(parameter.dtype == torch.float32 for parameter in tuning.parameters)
    before = [parameter.detach().clone() for parameter in tuning.parameters]
    for _ in range(3):
        for row in Packing(100).rows(batch, [VISUAL]):
            (loss,) = packed_losses(llm, [projector], row)
            loss.backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is None for parameter in llm.model.parameters())
        rows = [parameter.grad for parameter in tuning.parameters]
        optimizer.zero_grad()
        (row,) = Packing(1000).rows(batch, [VISUAL])
        packed_losses(llm, [projector], row)[0].backward()  # type: ignore[no-untyped-call]
        for split, parameter in zip(rows, tuning.parameters, strict=True):
            assert split is not None
            assert parameter.grad is not None
            assert float((split - parameter.grad).norm()) < 0.1 * float(parameter.grad.norm())
        optimizer.step()
        optimizer.zero_grad()
        tuning.after_step()
    for old, master, short in zip(before, tuning.parameters, llm.model.parameters(), strict=True):
        assert 0 < float((master - old).detach().abs().max()) < 1e-4
        torch.testing.assert_close(short, master.bfloat16())


def test_copies_in_fp32_go_on_from_a_checkpoint_and_from_another_process(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm", "qwen3")

    def tuning() -> Tuning:
        return Tuning(policy(tune="llm"), load_language_model(folder, dtype=torch.bfloat16))

    def short(some: Tuning) -> list[torch.Tensor]:
        assert some.weights
        return [parameter.detach() for parameter in some.weights.parameters]

    first, second, third = tuning(), tuning(), tuning()
    with torch.no_grad():
        for parameter in first.parameters:
            parameter.mul_(1.1)
    first.after_step()
    assert first.weights
    sums = {}
    for name, data in first.weights.files():
        path = tmp_path / "checkpoint/llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        sums[f"llm/{name}"] = hashlib.sha256(data).hexdigest()
    write_sums(tmp_path / "checkpoint", sums)
    second.load(tmp_path / "checkpoint")
    torch.testing.assert_close(short(second), short(first), rtol=0, atol=0)
    rounded = [parameter.float() for parameter in short(first)]
    torch.testing.assert_close(second.all_tensors(), rounded, rtol=0, atol=0)
    second.restore([copy.clone() for copy in first.state()])
    third.take([copy.clone() for copy in first.all_tensors()])
    for other in (second, third):
        torch.testing.assert_close(other.all_tensors(), first.all_tensors(), rtol=0, atol=0)
        torch.testing.assert_close(short(other), short(first), rtol=0, atol=0)


def test_adapters_of_one_seed_are_the_same_and_leave_no_trace(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "qwen3"))
    ids = torch.arange(9)[None]
    before, names = llm.model(ids).logits, list(llm.model.state_dict())
    state = torch.get_rng_state()
    first = Tuning(policy(tune="lora", seed=4), llm)
    drawn = [parameter.detach().clone() for parameter in first.parameters]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(llm.model(ids).logits, before)
    first.remove()
    assert list(llm.model.state_dict()) == names
    second = Tuning(policy(tune="lora", seed=4), llm)
    assert all(torch.equal(a, b) for a, b in zip(drawn, second.parameters, strict=True))
    assert isinstance(second.weights, LoraAdapter)


def test_norms_and_biases_do_not_decay(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "qwen3"))
    config = policy(tune="llm", weight_decay=0.1, lr_llm=3e-5)
    tuning, projector = Tuning(config, llm), build_projector("mlp", WIDTH, llm.hidden)
    (optimizer,) = build_optimizers(config, projector, tuning.parameters)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len([*projector.parameters(), *tuning.parameters])
    assert all((decay > 0) == (parameter.ndim > 1) for parameter, decay in decays.items())
    peaks = {p: group["peak"] for group in optimizer.param_groups for p in group["params"]}
    assert {peaks[parameter] for parameter in tuning.parameters} == {3e-5}
    assert {peaks[parameter] for parameter in projector.parameters()} == {2e-3}


def test_adapters_of_a_head_of_its_own_can_be_read_but_not_trained(tmp_path: Path) -> None:
    """The loss takes the head's weight, beside which an adapter would stay as it began."""
    llm = load_language_model(write_language_model(tmp_path / "llm", "llama"))
    llm.model.lm_head.weight = torch.nn.Parameter(llm.head.clone(), requires_grad=False)
    names = list(llm.model.state_dict())
    with pytest.raises(LlavaError, match="expected --lora-targets in its blocks; got lm_head"):
        LoraAdapter.new(llm, 2, 4, 0.0, "lm_head,q_proj")
    assert list(llm.model.state_dict()) == names
    adapter = LoraAdapter(llm, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert adapter.beside_blocks == ["lm_head"]


def test_a_generation_config_that_transformers_refuses_is_saved_as_it_is(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "qwen3"))
    llm.model.generation_config.update(do_sample=False, temperature=0.9)  # as vicuna's
    saved = dict(AllWeights(llm).files())
    assert json.loads(saved["generation_config.json"])["temperature"] == 0.9
