"""Optimizers, AdamW and Muon, and the learning rate of each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_core.projector.projector import Projector
from train.config import RunConfig
from train.tuning import LR

MOMENTUM = 0.6
"""Momentum of Muon; the usual 0.95 averages over more steps than a short run has."""
LEAST_NORM = 1e-15
"""What a gradient is divided by at least. In fp32 the norm of entries below 3e-23 is 0, as their squares are:
divided by less, they would become large."""


def build_optimizers(
    config: RunConfig, projector: Projector, llm_parameters: Sequence[torch.nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """One optimizer for all that trains, or two where the projector has Muon and the language model AdamW.

    Each of their groups has its `peak` learning rate.
    """
    own = _groups(list(projector.parameters()), config.lr, config.weight_decay)
    peak = LR.get(config.tune, 0.0) if config.lr_llm is None else config.lr_llm
    others = _groups(llm_parameters, peak, config.weight_decay)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW([*own, *others])]
    return [Muon(own, config.lr), *([torch.optim.AdamW(others)] if others else [])]


def _groups(parameters: Sequence[torch.nn.Parameter], peak: float, weight_decay: float) -> list[Any]:
    """Parameter groups in the parameters' order; norms and biases, which are vectors, do not decay."""
    groups = itertools.groupby(parameters, lambda parameter: weight_decay > 0 and parameter.ndim > 1)
    return [
        {"params": list(some), "lr": peak, "peak": peak, "weight_decay": weight_decay if decays else 0.0}
        for decays, some in groups
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from a `state_dict`; the groups stay as the flags make them, earlier versions had one."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate(config: RunConfig, step: int, steps: int, peak: float | None = None) -> float:
    """Learning rate of step number `step` (from 0) of `steps`: linear warm-up, then to 0 by --decay.

    `peak` is the highest, by default --lr.
    """
    peak = config.lr if peak is None else peak
    warmup = round(config.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (1 - share if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class Muon(torch.optim.Optimizer):
    """Momentum with all singular values made about 1 (Keller Jordan, kellerjordan.github.io/posts/muon).

    `lr` is the length of a step as a share of the parameter's norm before the first one (of 1, if that was
    0): the same rate fits language models with large and with small embeddings. A vector counts as a
    matrix of one column, so its step is its momentum at that length.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = MOMENTUM) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                self._step(parameter, group)

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            norm = parameter.norm()
            state["size"] = torch.where(norm > 0, norm, 1.0)
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
        ahead = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
        direction = orthogonal(ahead.reshape(len(ahead), -1)).reshape_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(direction * (group["lr"] * state["size"] / direction.norm().clamp(min=1e-7)))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """U V of the singular value decomposition U S V, with singular values of 0.7 to 1.2 instead of 1.

    Newton-Schulz iteration of degree 5 with Keller Jordan's coefficients, which are steep at 0.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if len(matrix) > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x: torch.Tensor = matrix / matrix.norm().clamp(min=LEAST_NORM)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x
