"""Muon, and the rate of each step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from train.config import RunConfig
from train.optimizer import Muon, learning_rate, orthogonal


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20)])
def test_singular_values_become_alike_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -2, min(shape))
    turned = u.T @ orthogonal(u * values @ vt) @ vt.T
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.25
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-4


def stepped(scale: float) -> tuple[torch.Tensor, list[float]]:
    """A matrix after five steps with the same gradients, and the length of each step."""
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(6, 9) * scale)
    optimizer = Muon([matrix], lr=0.1)
    lengths = []
    for _ in range(5):
        before = matrix.detach().clone()
        matrix.grad = torch.randn(6, 9)
        optimizer.step()
        lengths.append(float((matrix.detach() - before).norm()))
    return matrix.detach(), lengths


def test_a_step_is_a_share_of_the_norm_before_the_first() -> None:
    torch.manual_seed(0)
    norm = float(torch.randn(6, 9).norm())
    small, lengths = stepped(1.0)
    assert lengths == pytest.approx([0.1 * norm] * 5, rel=1e-4)
    large, _ = stepped(30.0)
    assert torch.allclose(large, 30 * small, rtol=1e-4)


def test_vectors_zeros_and_missing_gradients() -> None:
    bias, nothing, still = (torch.nn.Parameter(torch.zeros(4)) for _ in range(3))
    bias.grad, nothing.grad = torch.tensor([3.0, 0.0, -4.0, 0.0]), torch.zeros(4)
    Muon([bias, nothing, still], lr=0.1).step()
    assert bias.tolist() == pytest.approx([-0.06, 0, 0.08, 0], abs=1e-6)  # from 0, as if of norm 1
    assert not nothing.any()
    assert not still.any()


@pytest.mark.parametrize("size", [1e-10, 1e-20, 1e-22, 1e-30, 1e-44])
def test_gradients_that_vanish_do_not_explode(size: float) -> None:
    """As of units that are saturated: their squares are 0 in fp32."""
    for shape in ((32,), (8, 16)):
        parameter = torch.ones(shape).requires_grad_()
        optimizer = Muon([parameter], lr=0.1)
        for _ in range(3):
            parameter.grad = torch.full(shape, size)
            optimizer.step()
        assert parameter.isfinite().all()
        assert (1 - parameter).norm() <= 0.31 * torch.ones(shape).norm()


def test_weight_decay_draws_towards_zero() -> None:
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    matrix.grad = torch.zeros(2, 2)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2


def test_rates_rise_and_fall() -> None:
    config = RunConfig(features=Path(), llm=Path(), out=Path(), lr=1.0, warmup=0.2)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert 0 < rates[9] < 0.05
    straight = dataclasses.replace(config, decay="linear")
    assert [learning_rate(straight, step, 10) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]
