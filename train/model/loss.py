"""The caption loss: log loss of answer tokens, given features, through projector and language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llava_core.language.model import LanguageModel
from train.data.packing import Row
from train.model.frozen_block import ends_early

CHUNK_LOGITS = 1 << 25
"""Most logits that exist at once: 128 MiB in fp32."""
ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
COMPILED = "compiled_loss"
"""Attribute of a transformers model whose blocks are compiled: a compiled ChunkLoss."""


def packed_losses(llm: LanguageModel, projectors: Sequence[torch.nn.Module], row: Row) -> list[torch.Tensor]:
    """Log loss in nats, summed over the answer tokens of each pack in a row: scalars in fp32.

    One pass through the language model for all projectors. No sample sees another, so a projector's gradient
    is what it would be alone. Divide by the answer tokens of the step: then splitting it changes nothing.
    """
    chunk = vars(llm.model).get(COMPILED, loss_of_chunk)
    return [
        head_loss(own, llm.head, pack.targets, chunk)
        for own, (_, pack) in zip(_hidden(llm, projectors, row), row.packs, strict=False)
    ]


@torch.no_grad()
def token_losses(llm: LanguageModel, projector: torch.nn.Module, row: Row) -> torch.Tensor:
    """Log loss in nats of each answer token, in the samples' order: fp32 [answer tokens in the row]."""
    return torch.cat(
        [
            F.cross_entropy((hidden[part] @ llm.head.T).float(), pack.targets[part], reduction="none")
            for hidden, (_, pack) in zip(_hidden(llm, [projector], row), row.packs, strict=False)
            for part in _chunks(hidden, llm.head)
        ]
    )


def _hidden(llm: LanguageModel, projectors: Sequence[torch.nn.Module], row: Row) -> tuple[torch.Tensor, ...]:
    """Final hidden states, normed, of the tokens of each pack that predict a target: [A, hidden] each."""
    parts, predicting, before = [], [], 0
    for k, pack in row.packs:
        embedded = llm.embed(pack.ids)
        if len(pack.features):
            projected = projectors[k](pack.features.float()).flatten(0, 1)
            embedded = embedded.index_copy(0, pack.visual, projected.to(llm.dtype))
        parts.append(embedded)
        predicting.append(pack.predicting + before)
        before += len(embedded)
    padding = llm.embed(row.starts.new_zeros(row.padding))
    hidden = forward_blocks(llm, torch.cat([*parts, padding]), row, torch.cat(predicting))
    return hidden.split([*map(len, predicting)])  # type: ignore[no-any-return, no-untyped-call]


def forward_blocks(
    llm: LanguageModel, embedded: torch.Tensor, row: Row, wanted: torch.Tensor | None = None
) -> torch.Tensor:
    """Embeddings of a row [N, hidden] -> final hidden states of the language model, normed, [N, hidden], or
    of the tokens at `wanted` alone."""
    early = wanted is not None and ends_early(llm.model)
    out = llm.model.base_model(
        inputs_embeds=embedded[None],
        position_ids=row.positions[None],
        use_cache=False,
        starts=row.starts,
        longest=row.longest,
        **({"wanted": wanted} if early else {}),
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden if wanted is None or len(hidden) == len(wanted) else hidden[wanted]


def loss_of_chunk(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of some tokens, and its gradient by the logits, fp32 [A, V]."""
    log_p = F.log_softmax((hidden @ head.T).float(), dim=-1)
    loss = F.nll_loss(log_p, targets, reduction="sum")
    error = log_p.exp_()
    error[torch.arange(len(error), device=error.device), targets] -= 1
    return loss, error


def loss_to_compile(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss_of_chunk` without indexing, so that all behind the product is one pass, and the gradient in the
    head's type."""
    log_p = F.log_softmax((hidden @ head.T).float(), dim=-1)
    right = targets[:, None] == torch.arange(len(head), device=head.device)
    return -log_p.gather(1, targets[:, None]).sum(), (log_p.exp() - right.float()).to(head.dtype)


def head_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: ChunkLoss = loss_of_chunk
) -> torch.Tensor:
    """Summed cross entropy of hidden [A, H] against targets [A] through a head [V, H]: a scalar."""
    loss: torch.Tensor = HeadLoss.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


class HeadLoss(torch.autograd.Function):
    """`head_loss` with little memory.

    The gradients are taken in the forward pass, chunk by chunk, so at most CHUNK_LOGITS logits exist at a
    time, and none wait for the backward pass (the idea of Liger Kernel's fused linear cross entropy,
    arXiv:2410.10989). The head's gradient is summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, chunk: ChunkLoss
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunk = chunk if of_head is None else loss_of_chunk
        for part in _chunks(hidden, head):
            loss, error = chunk(hidden[part], head, targets[part])
            total += loss
            if gradient is not None:
                gradient[part] = error.to(head.dtype) @ head
                if of_head is not None:
                    of_head += error.T @ hidden[part].float()
        if gradient is not None:
            ctx.save_for_backward(gradient, of_head)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, of_head = ctx.saved_tensors
        if of_head is not None:
            of_head = (of_head * outputs[0]).to(gradient.dtype)
        return (gradient * outputs[0]).to(gradient.dtype), of_head, None, None


def _chunks(hidden: torch.Tensor, head: torch.Tensor) -> Iterator[slice]:
    """Some rows of hidden [A, H] at a time, of which there are at most CHUNK_LOGITS logits."""
    rows = max(1, CHUNK_LOGITS // head.shape[0])
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)
