"""Which attention kernel takes packs: a right one passes in every type, a wrong one in none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from tests.support.language_models import write_language_model
from tests.support.paths import WORLD_MODELS
from train.model.blocks import as_written, original_attention
from train.model.packed_attention import KERNELS, Attend, Kernel, on_a_cpu, one_by_one
from train.model.packed_model import prepare

WORLD = WORLD_MODELS / "llm"


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def llm(request: pytest.FixtureRequest) -> LanguageModel:
    return load_language_model(WORLD, "cpu", request.param)


def with_starts(change: Callable[[torch.Tensor], torch.Tensor]) -> Attend:
    """Right but for where samples begin."""
    return lambda q, k, v, starts, longest, scale: one_by_one(q, k, v, change(starts), longest, scale)


def one_later(starts: torch.Tensor) -> torch.Tensor:
    return torch.cat([starts[:1], starts[1:-1] + 1, starts[-1:]])


def scaled(factor: float) -> Attend:
    return lambda q, k, v, starts, longest, scale: one_by_one(q, k, v, starts, longest, scale * factor)


def not_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    lengths = starts.diff().tolist()
    samples = zip(*(torch.split(x[None].transpose(1, 2), lengths, 2) for x in (q, k, v)), strict=True)
    parts = [F.scaled_dot_product_attention(a, b, c, scale=scale, enable_gqa=True) for a, b, c in samples]
    return torch.cat(parts, 2)[0].transpose(0, 1)


def textbook(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Right, in another order of operations."""
    repeat, outputs = q.shape[1] // k.shape[1], []
    for part in map(slice, starts[:-1].tolist(), starts[1:].tolist()):
        a, b, c = (x.transpose(0, 1) for x in (q[part], k[part], v[part]))
        scores = a @ b.repeat_interleave(repeat, 0).transpose(1, 2) * scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1, torch.float32).to(q.dtype)
        outputs.append((weights @ c.repeat_interleave(repeat, 0)).transpose(0, 1))
    return torch.cat(outputs)


RIGHT: dict[str, Attend] = {"loop": one_by_one, "operation": on_a_cpu, "textbook": textbook}
WRONG: dict[str, Attend] = {
    "all samples are one": with_starts(lambda starts: starts[[0, -1]]),
    "samples begin one later": with_starts(one_later),
    "scale": scaled(1.41),
    "scale by a tenth": scaled(1.1),
    "not causal": not_causal,
}


def kernel(name: str, attend: Attend) -> Kernel:
    return Kernel(name, lambda: attend)


def offer(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> None:
    monkeypatch.setitem(KERNELS, "cpu", kernels)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_taken(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    offer(monkeypatch, kernel(name, RIGHT[name]))
    prepared = prepare(llm)
    assert prepared.attention == name
    assert not prepared.passed_over
    assert 0 <= prepared.distances["logits"] < 0.02
    assert (prepared.own["logits"] > 1e-3) == (llm.dtype == torch.bfloat16)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_not(
    llm: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    offer(monkeypatch, kernel("wrong", WRONG[name]), kernel("right", one_by_one))
    prepared = prepare(llm)
    assert prepared.attention == "right"
    assert "away from those of samples alone" in prepared.passed_over["wrong"]
    said = capsys.readouterr().err
    assert "attention: not wrong, which gives " in said
    assert "attention: right; distance from fp32: logits " in said
    figures = prepared.figures()
    assert figures["attention_passed_over"].startswith("wrong: gives ")
    assert figures["attention_logits_distance"] == prepared.distances["logits"]


def test_the_model_is_as_it_was(llm: LanguageModel) -> None:
    """The fp32 that kernels are compared with leaves nothing behind."""
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    ids = torch.arange(5)[None]
    with original_attention(llm), torch.no_grad():
        expected = llm.model(ids).logits
    prepare(llm)
    with original_attention(llm), torch.no_grad():
        assert torch.equal(llm.model(ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in llm.model.state_dict().items())
    as_written(llm)
    assert not any("forward" in vars(module) for module in llm.model.modules())


def raising(error: Exception) -> Kernel:
    def attend(*args: object) -> torch.Tensor:
        raise error

    return Kernel("broken", lambda: attend, remedy="reinstall it")


def test_what_is_not_there_or_cannot_take_the_model_is_passed_over(
    llm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Attend:
        raise ImportError("No module named 'flash_attn'")

    too_old = RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    offer(monkeypatch, Kernel("absent", absent), raising(too_old), kernel("right", one_by_one))
    assert prepare(llm).passed_over == {
        "absent": "cannot be imported: No module named 'flash_attn'",
        "broken": f"cannot take this model: {too_old}",
    }


def test_a_device_that_fails_is_no_kernel_that_is_not_there(
    llm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = kernel("right", one_by_one)
    failed = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")
    offer(monkeypatch, raising(failed), right)
    with pytest.raises(LlavaError, match=r"failed in the attention kernel broken.*illegal.*reinstall it"):
        prepare(llm)
    offer(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), right)
    with pytest.raises(torch.OutOfMemoryError):
        prepare(llm)


def test_a_type_that_hides_wrong_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm"), "cpu", torch.bfloat16)
    monkeypatch.setattr("train.model.packed_model.BLURRED", 1e-4)
    with pytest.raises(LlavaError, match="in bfloat16 is too far from fp32 to be checked"):
        prepare(llm)
