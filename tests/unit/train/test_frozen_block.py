"""Blocks of Llama's kind written out: as transformers has them, whatever the samples' lengths."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava_core.language.load import load_language_model
from llava_core.language.tuned_weights import LoraAdapter
from tests.support.language_models import write_language_model
from tests.support.loss import summed_loss
from tests.unit.train.test_loss import VISUAL, a_batch, a_projector, gradients
from train.data.packing import pack
from train.model.blocks import as_written
from train.model.frozen_block import Attention, Weights, ends_early
from train.model.packed_model import prepare

WRITTEN_OUT = {"qwen3", "llama"}


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [([5, 5, 5], True), ([5, 4, 5], True), ([40, 1, 2, 3], False), ([7], False), ([6, 0, 6], True)],
)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_is_that_of_each_sample_alone(lengths: list[int], padded: bool, key_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8, requires_grad=True) for heads in (4, key_heads, key_heads))
    outputs = []
    for a, b, c in zip(*(torch.split(x[None].transpose(1, 2), lengths, 2) for x in (q, k, v)), strict=True):
        outputs.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=0.3, enable_gqa=True))
    expected = torch.cat(outputs, 2)[0].transpose(0, 1)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), gradient)
    attention = Attention(torch.tensor([0, *lengths]).cumsum(0), 0.3)
    assert attention.padded == padded
    with torch.no_grad():
        out, kept = attention.forward(q, k, v)
        got = attention.backward(gradient, key_heads, kept)
    torch.testing.assert_close((out, *got), (expected, *wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(WRITTEN_OUT))
def test_a_block_gives_the_same_as_it_is_written(tmp_path: Path, kind: str) -> None:
    """Of tokens that predict nothing, the last block gives keys and values alone."""
    llm = load_language_model(write_language_model(tmp_path / "llm", kind))
    prepare(llm)
    batch, projector = a_batch(llm), a_projector(llm)
    packed = pack(batch.features, VISUAL, batch.examples)
    losses, grads = [], []
    for early in (True, False):
        assert ends_early(llm.model) == early
        losses.append(summed_loss(llm, projector, packed))
        losses[-1].backward()  # type: ignore[no-untyped-call]
        grads.append(gradients(projector))
        as_written(llm)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma"])
def test_what_is_of_another_kind_stays_as_it_is_written(tmp_path: Path, kind: str) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", kind))
    prepare(llm)
    assert ends_early(llm.model) == (kind in WRITTEN_OUT)


def test_what_trains_or_is_in_a_short_type_is_not_frozen(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    short = load_language_model(folder, "cpu", torch.bfloat16)
    prepare(short)
    assert not ends_early(short.model)
    llm = load_language_model(folder)
    prepare(llm)
    block = llm.model.base_model.layers[-1]
    assert Weights.of(block) is not None
    adapter = LoraAdapter.new(llm, 4, 8, 0.0, "q_proj")
    assert Weights.of(block) is None
    adapter.remove()
    assert Weights.of(block) is not None
    block.mlp.up_proj.weight.requires_grad_()
    assert Weights.of(block) is None


def test_a_window_is_that_of_the_layer_or_else_of_the_model() -> None:
    """Qwen3's layers say None where the model has a window for others; Mistral's say nothing."""
    model = types.SimpleNamespace(sliding_window=8)
    assert Weights.window(types.SimpleNamespace(config=model)) == 8
    assert Weights.window(types.SimpleNamespace(config=model, sliding_window=None)) is None
