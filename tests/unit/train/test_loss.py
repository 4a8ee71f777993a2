"""The packed loss is the textbook loss: one sample at a time, full logits, transformers' own attention."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Example, Turn
from llava_core.projector.projector import build_projector
from tests.support.language_models import byte_tokenizer, write_language_model
from tests.support.loss import summed_loss
from train.data.batch import Batch, TextCounts
from train.data.packing import Packing, pack
from train.model.blocks import compilations, original_attention
from train.model.loss import head_loss, packed_losses
from train.model.packed_attention import KERNELS, Kernel, flash_varlen, on_a_cpu, torch_varlen
from train.model.packed_model import prepare

VISUAL, WIDTH = 5, 12


@pytest.fixture(params=["qwen3", "llama"])
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    return load_language_model(write_language_model(tmp_path / "llm", request.param))


def a_batch(llm: LanguageModel) -> Batch:
    answers = ["红色的圆", "a", "a blue square, far left", "xyz" * 9]
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    examples = [chat.example([Turn("看图", answer)], max_answer_tokens=20) for answer in answers]
    torch.manual_seed(1)
    return batch_of(torch.randn(len(answers), VISUAL, WIDTH).half(), examples)


def batch_of(features: torch.Tensor, examples: list[Example]) -> Batch:
    return Batch(features, examples, TextCounts.of(examples))


def a_projector(llm: LanguageModel) -> torch.nn.Module:
    torch.manual_seed(2)
    return build_projector("mlp", WIDTH, llm.hidden)


def reference_loss(llm: LanguageModel, projector: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Each sample alone through the whole model with eager attention, loss over full logits."""
    llm.model.config._attn_implementation = "eager"
    total = torch.zeros(())
    pictures = iter(batch.features)
    for example in batch.examples:
        embedded, labels = llm.embed(torch.tensor(example.ids)), torch.tensor(example.labels)
        if example.picture:
            embedded = torch.cat([projector(next(pictures).float()), embedded])
            labels = torch.cat([torch.full((VISUAL,), IGNORE), labels])
        logits = llm.model(inputs_embeds=embedded[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
    return total


def gradients(projector: torch.nn.Module) -> torch.Tensor:
    grads = torch.cat([p.grad.flatten() for p in projector.parameters() if p.grad is not None])
    projector.zero_grad()
    return grads


@pytest.mark.parametrize(
    ("packing", "forwards"), [(Packing(10_000), 1), (Packing(100), 3), (Packing(100, unit=64), 3)]
)
def test_packed_equals_per_sample(llm: LanguageModel, packing: Packing, forwards: int) -> None:
    batch, projector = a_batch(llm), a_projector(llm)
    reference = reference_loss(llm, projector, batch)
    reference.backward()  # type: ignore[no-untyped-call]
    expected = gradients(projector)

    prepare(llm)
    rows = list(packing.rows(batch, [VISUAL]))
    assert len(rows) == forwards
    assert all(len(row.positions) % packing.unit == 0 for row in rows)
    total = sum(loss for row in rows for loss in packed_losses(llm, [projector], row))
    assert isinstance(total, torch.Tensor)
    total.backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(total, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(projector), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shown", ["0110", "1001", "0001", "0000"])
@pytest.mark.parametrize("packing", [Packing(10_000), Packing(100, unit=64)])
def test_packed_equals_per_sample_where_some_have_no_picture(
    llm: LanguageModel, packing: Packing, shown: str
) -> None:
    """Loss, and gradients of projector and language model."""
    whole, projector = a_batch(llm), a_projector(llm)
    examples = [
        dataclasses.replace(example, picture=flag == "1")
        for example, flag in zip(whole.examples, shown, strict=True)
    ]
    batch = batch_of(whole.features[[flag == "1" for flag in shown]], examples)
    trained = [*projector.parameters(), *llm.model.requires_grad_().parameters()]
    reference = reference_loss(llm, projector, batch)
    expected = torch.autograd.grad(reference, trained, allow_unused=True)

    prepare(llm)
    rows = list(packing.rows(batch, [VISUAL]))
    tokens = batch.counts.pictures * VISUAL + batch.counts.tokens
    assert sum(len(row.positions) - row.padding for row in rows) == tokens
    total = sum(loss for row in rows for loss in packed_losses(llm, [projector], row))
    assert isinstance(total, torch.Tensor)
    got = torch.autograd.grad(total, trained, allow_unused=True)
    torch.testing.assert_close(total, reference, rtol=1e-5, atol=1e-5)
    for own, alone in zip(got, expected, strict=True):
        assert (own is None) == (alone is None)
        if own is not None and alone is not None:
            torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of torch.compile: the first makes the same graphs for the same shapes as the second, without code."""
    if request.param == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=request.param))
    return str(request.param)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_compiled_once_for_rows_of_any_length_and_equal(llm: LanguageModel, backend: str) -> None:
    """Twice at most: torch begins with a graph for the first length. Batches of two sizes, with gradients."""
    batch, projector = a_batch(llm), a_projector(llm)
    batches = [
        batch_of(batch.features[order], [batch.examples[i] for i in order])
        for order in ([0, 1, 2], [1, 0, 1], [3, 2, 1], [2, 3, 0], [3, 3, 3], [0], [3])
    ]

    def losses(unit: int) -> torch.Tensor:
        summed = []
        for some in batches:
            (row,) = Packing(10_000, unit).rows(some, [VISUAL])
            lengths.add(len(row.positions))
            (loss,) = packed_losses(llm, [projector], row)
            loss.backward()  # type: ignore[no-untyped-call]
            summed.append(loss.detach())
        return torch.stack(summed)

    torch._dynamo.reset()
    lengths: set[int] = set()
    prepare(llm)
    expected, wanted = losses(unit=1), gradients(projector)
    before = compilations()
    assert prepare(llm, "on").compiled
    lengths.clear()
    torch.testing.assert_close(losses(unit=8), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(projector), wanted, rtol=1e-4, atol=5e-5)
    # All blocks share what is compiled for one; the first graphs are the check's, two are the head's.
    assert len(lengths) >= 5
    assert compilations() - before <= 5
    with original_attention(llm):
        llm.model(torch.arange(5)[None], use_cache=True)
    assert compilations() - before <= 5


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_kernel_that_lies_in_a_module_of_torch_s_is_compiled_too(
    llm: LanguageModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; in the place of its kernel is the CPU's."""
    pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, others: torch.Tensor,
        longest: int, most: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        return on_a_cpu(q, k, v, starts, longest, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    kernels = (Kernel("flash", flash_varlen), Kernel("varlen", torch_varlen))  # there is no flash-attn here
    monkeypatch.setitem(KERNELS, "cpu", kernels)
    prepared = prepare(llm, "on")
    assert prepared.compiled
    assert prepared.attention == "varlen"


def test_a_model_that_cannot_be_packed_is_refused(
    llm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here its head has a soft cap, as Gemma's."""
    forward = llm.model.lm_head.forward
    monkeypatch.setattr(llm.model.lm_head, "forward", lambda hidden: torch.tanh(forward(hidden)) * 3)
    with pytest.raises(LlavaError, match="cannot pack samples for a"):
        prepare(llm)


def test_attention_of_another_kind_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LlavaError, match="soft cap"):
        prepare(load_language_model(tmp_path))


def test_the_model_takes_no_gradients(llm: LanguageModel) -> None:
    prepare(llm)
    batch, projector = a_batch(llm), a_projector(llm)
    summed_loss(llm, projector, pack(batch.features, VISUAL, batch.examples)).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None and not p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training


@pytest.mark.parametrize("chunk", [1, 7 * 11, 10**6])
def test_head_loss_equals_cross_entropy(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.model.loss.CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head, targets = torch.randn(11, 6, dtype=torch.double), torch.randint(0, 11, (23,))
    hidden = torch.randn(23, 6, dtype=torch.double, requires_grad=True)
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (grad,) = torch.autograd.grad(expected, hidden)
    loss = head_loss(hidden, head, targets)
    (ours,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, 3 * grad, rtol=1e-4, atol=1e-5)


def test_pack_lays_samples_end_to_end() -> None:
    features = torch.zeros(2, 2, 3)
    first = Example([7, 8, 9], [IGNORE, 8, 9], cut=False)
    second = Example([6, 5], [IGNORE, 5], cut=False)
    laid = pack(features, 2, [first, second])
    assert laid.ids.tolist() == [0, 0, 7, 8, 9, 0, 0, 6, 5]
    assert laid.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert laid.visual.tolist() == [0, 1, 5, 6]
    assert laid.predicting.tolist() == [2, 3, 7]
    assert laid.targets.tolist() == [8, 9, 5]
    assert laid.lengths == [5, 4]


def test_a_sample_over_the_budget_is_named(llm: LanguageModel) -> None:
    with pytest.raises(LlavaError, match="--micro-tokens"):
        list(Packing(30).rows(a_batch(llm), [VISUAL]))


def peak_of_head_loss(answers: int) -> int:
    """Bytes resident at most in a process that takes the loss and gradient of N answer tokens."""
    script = f"""
import resource, torch
from train.model.loss import head_loss
hidden, head = torch.randn({answers}, 8, requires_grad=True), torch.randn(65_536, 8)
head_loss(hidden, head, torch.randint(0, 65_536, ({answers},))).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)


def test_memory_does_not_grow_with_vocabulary_times_tokens() -> None:
    """Logits of 5,632 tokens more would take 1.4 GB; there are never more than those of 1,024."""
    assert peak_of_head_loss(6656) - peak_of_head_loss(1024) < 100e6
