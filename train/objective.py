"""The caption loss: packs through projector and frozen language model to summed log loss of the answers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llava_core.errors import LlavaError
from llava_core.language import LanguageModel
from train.packing import ATTENTION, Pack

CHUNK_LOGITS = 1 << 25
"""Most logits that exist at once: 128 MiB in fp32."""


def prepare(llm: LanguageModel) -> None:
    """Let the language model take packs.

    Raises LlavaError if its logits are more than a product with the head's weight.
    """
    device = llm.device
    probe = torch.tensor([[1, 2]], device=device)
    with torch.no_grad():
        expected = llm.model(probe).logits
        plain = llm.model.base_model(probe).last_hidden_state @ llm.head.T
    if not torch.allclose(plain.float(), expected.float(), rtol=0.05, atol=0.05):
        raise LlavaError(
            "this language model's head is more than one matrix (a bias, soft cap or scale)",
            expected="a plain head, as in Qwen3 or Llama",
            got=llm.identity["architecture"],
        )
    llm.model.config._attn_implementation = ATTENTION


def summed_loss(llm: LanguageModel, projector: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """Log loss in nats of a pack's answer tokens, summed: a scalar in fp32.

    Divide by the answer tokens of the whole step, so that splitting a step into packs changes nothing.
    """
    projected = projector(pack.features.float()).flatten(0, 1)
    embedded = llm.embed(pack.ids).index_copy(0, pack.visual, projected.to(llm.dtype))
    hidden = llm.model.base_model(
        inputs_embeds=embedded[None], position_ids=pack.positions[None], use_cache=False, lengths=pack.lengths
    ).last_hidden_state[0]
    return head_loss(hidden[pack.predicting], llm.head, pack.targets)


def head_loss(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of hidden [A, H] against targets [A] through a frozen head [V, H]: a scalar."""
    loss: torch.Tensor = HeadLoss.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss(torch.autograd.Function):
    """`head_loss` with little memory.

    The gradient with respect to `hidden` is taken in the forward pass, chunk by chunk, so at most
    CHUNK_LOGITS logits exist at a time, and none wait for the backward pass (the idea of Liger Kernel's
    fused linear cross entropy, arXiv:2410.10989, less the weight's gradient).
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK_LOGITS // head.shape[0])
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            log_p = F.log_softmax((hidden[part] @ head.T).float(), dim=-1)
            total += F.nll_loss(log_p, targets[part], reduction="sum")
            if gradient is not None:
                error = log_p.exp_()
                error[torch.arange(len(error), device=error.device), targets[part]] -= 1
                gradient[part] = error.to(head.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None
