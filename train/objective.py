"""The caption loss: packs through projector and frozen language model to summed log loss of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from llava_core.errors import LlavaError, first_line
from llava_core.language import LanguageModel
from train.packing import ATTENTION, Pack

CHUNK_LOGITS = 1 << 25
"""Most logits that exist at once: 128 MiB in fp32."""


@torch.no_grad()
def prepare(llm: LanguageModel) -> None:
    """Let the language model take packs.

    Raises LlavaError unless packed samples give the logits that they give alone: a head of more than one
    matrix, layers other than attention, or attention of its own kind would make the loss silently wrong.
    """
    lengths = [9, 5]
    ids = torch.arange(sum(lengths), device=llm.device)[None]
    alone = [llm.model(part, use_cache=False).logits[0] for part in torch.split(ids, lengths, 1)]
    llm.model.config._attn_implementation = ATTENTION
    positions = torch.cat([torch.arange(length, device=llm.device) for length in lengths])[None]
    try:
        out = llm.model.base_model(ids, position_ids=positions, use_cache=False, lengths=lengths)
        packed = (out.last_hidden_state[0] @ llm.head.T).float()
    except (TypeError, RuntimeError, ValueError) as error:
        raise _unfit(llm, first_line(error)) from None
    expected = torch.cat(alone).float()
    distance = float((packed - expected).norm() / expected.norm())
    if not distance < (1e-4 if llm.dtype == torch.float32 else 3e-2):
        raise _unfit(llm, f"packed logits {distance:.1%} away from those of samples alone")


@contextmanager
def own_attention(llm: LanguageModel) -> Iterator[None]:
    """The model as transformers made it, for a while: generating needs a cache, unknown to packs."""
    config = llm.model.config
    packed = config._attn_implementation
    config._attn_implementation = "sdpa" if getattr(llm.model, "_supports_sdpa", False) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = packed


def _unfit(llm: LanguageModel, got: str) -> LlavaError:
    return LlavaError(
        f"this trainer cannot pack samples for a {llm.identity['architecture']}",
        expected="plain causal attention and a plain vocabulary head, as in Qwen3 or Llama",
        got=got,
    )


def summed_loss(llm: LanguageModel, projector: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """Log loss in nats of a pack's answer tokens, summed: a scalar in fp32.

    Divide by the answer tokens of the whole step, so that splitting a step into packs changes nothing.
    """
    (loss,) = summed_losses(llm, [(projector, pack)])
    return loss


def summed_losses(llm: LanguageModel, parts: Sequence[tuple[torch.nn.Module, Pack]]) -> list[torch.Tensor]:
    """`summed_loss` of each projector on its pack, in one pass of all packs through the language model.

    No sample sees another, so a projector's gradient is what it would be alone.
    """
    rows = []
    for projector, pack in parts:
        projected = projector(pack.features.float()).flatten(0, 1)
        rows.append(llm.embed(pack.ids).index_copy(0, pack.visual, projected.to(llm.dtype)))
    packs = [pack for _, pack in parts]
    hidden = llm.model.base_model(
        inputs_embeds=torch.cat(rows)[None],
        position_ids=torch.cat([pack.positions for pack in packs])[None],
        use_cache=False,
        lengths=[length for pack in packs for length in pack.lengths],
    ).last_hidden_state[0]
    hiddens = hidden.split([len(row) for row in rows])
    return [
        head_loss(h[pack.predicting], llm.head, pack.targets) for h, pack in zip(hiddens, packs, strict=True)
    ]


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
