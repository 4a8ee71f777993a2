"""Freeze policies (--tune): which weights of the language model a run trains besides its projector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_core.language.model import LanguageModel
from llava_core.language.tuned_weights import AllWeights, LoraAdapter, TunedWeights
from llava_core.projector.checkpoint import require_part
from train.config import RunConfig

LR = {"lora": 2e-4, "llm": 2e-5}
"""--lr-llm by default, as LLaVA has them."""


def idle_flags(config: RunConfig) -> list[str]:
    """Flags that are given and have no effect with this --tune."""
    lora = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets") if config.tune != "lora" else ()
    names = (*(("lr_llm",) if config.tune == "projector" else ()), *lora)
    given = [name for name in names if getattr(config, name) != getattr(RunConfig, name)]
    return [f"--{name.replace('_', '-')}" for name in given]


class Tuning:
    """The language model's share of what trains: nothing, LoRA adapters or all weights, by --tune.

    An optimizer steps fp32 `parameters`: of weights in a shorter type it has copies, to whose gradients each
    backward pass adds in fp32.
    """

    def __init__(self, config: RunConfig, llm: LanguageModel) -> None:
        self.kind, self.weights = config.tune, tuned_weights(config, llm)
        trained = self.weights.parameters if self.weights else []
        for parameter in trained:
            parameter.requires_grad_()
        self.parameters = [_master(p) if p.dtype != torch.float32 else p for p in trained]
        self._copies = [(p, m) for p, m in zip(trained, self.parameters, strict=True) if p is not m]
        self.trained = sum(parameter.numel() for parameter in trained)
        """Number of weights."""

    @property
    def described(self) -> str:
        """What it trains, in words."""
        return "LoRA adapters" if self.kind == "lora" else "the whole language model"

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the model what the optimizer has made of the copies."""
        for parameter, master in self._copies:
            parameter.copy_(master)

    def remove(self) -> None:
        """Leave the model without adapters, as it was; all weights stay as they are trained."""
        if isinstance(self.weights, LoraAdapter):
            self.weights.remove()

    def dropout(self, on: bool) -> None:
        if self.weights:
            self.weights.dropout(on)

    def begin(self, init: Path | None) -> None:
        """Start from what a checkpoint has of the language model, if it has any."""
        if self.weights and init is not None and (init / self.weights.folder).exists():
            self.load(init)

    @torch.no_grad()
    def load(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint of the same policy. Raises LlavaError if they do not fit."""
        if self.weights:
            require_part(checkpoint, self.weights.folder)
            self.weights.load(checkpoint / self.weights.folder)
            for parameter, master in self._copies:
                master.copy_(parameter)

    def state(self) -> list[torch.Tensor]:
        """The copies in fp32, which a checkpoint's files have not."""
        return [master.detach() for _, master in self._copies]

    @torch.no_grad()
    def restore(self, state: Sequence[torch.Tensor]) -> None:
        """Go on from the `state` of a saved run, whose weights are loaded."""
        for (_, master), saved in zip(self._copies, state, strict=True):
            master.copy_(saved)

    def all_tensors(self) -> list[torch.Tensor]:
        """Everything that trains, for other processes to take."""
        return [parameter.detach() for parameter in self.parameters]

    @torch.no_grad()
    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take `all_tensors` of another process."""
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.copy_(tensor)
        self.after_step()


def tuned_weights(config: RunConfig, llm: LanguageModel) -> TunedWeights | None:
    """What --tune trains of the language model; adapters are random by --seed."""
    if config.tune == "projector":
        return None
    if config.tune == "llm":
        return AllWeights(llm)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        alpha, dropout = config.lora_alpha, config.lora_dropout
        return LoraAdapter.new(llm, config.lora_rank, alpha, dropout, config.lora_targets)


def _master(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A copy in fp32 that takes over the parameter's gradients."""
    master = torch.nn.Parameter(parameter.detach().float())

    def add(short: Any) -> None:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += short.grad
        short.grad = None

    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
    return master
