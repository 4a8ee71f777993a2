"""A frozen block of Llama's or Qwen3's kind as one operation: its output, and the gradient of its input.

transformers' blocks make some 60 small operations, and autograd as many more, each over all tokens; here they
are written out, in fp32 on a CPU: norms by their formula, rotations in place, attention of unlike samples in
one padded call. In the last block, tokens that predict nothing end after they have given keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.model.packed_attention import BACKWARD, FORWARD

PADDED = 1.5
"""Samples are padded to the longest where that makes at most so many times the scores."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a block computes with: matrices [out, in], norms' scales, and sizes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    first_norm: torch.Tensor
    second_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    eps: float
    width: int
    """Of an attention head."""
    scale: float

    @staticmethod
    def of(block: Any) -> Weights | None:
        """Those of a block, if it is of this kind, plain and frozen, and in fp32 on a CPU."""
        known = all(_has(getattr(block, name, block), parts) for name, parts in PARTS.items())
        if block.training or not known:
            return None
        attention, mlp = block.self_attn, block.mlp
        linear = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        own = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [block.input_layernorm, block.post_attention_layernorm, *filter(None, own)]
        if any(type(layer) is not nn.Linear or layer.bias is not None for layer in linear):
            return None
        if len({getattr(norm, "variance_epsilon", None) for norm in norms}) != 1:
            return None
        weights = [layer.weight for layer in (*linear, *norms)]
        if any(w.requires_grad or w.dtype != torch.float32 or w.device.type != "cpu" for w in weights):
            return None
        q_norm, k_norm = (None if norm is None else norm.weight for norm in own)
        sizes = (norms[0].variance_epsilon, attention.head_dim, attention.scaling)
        parts = [*weights[: len(linear) + 2], q_norm, k_norm, *sizes]
        return Weights(*parts)

    @staticmethod
    def window(attention: Any) -> int | None:
        """How many tokens back attention goes, if that is bounded."""
        window: int | None = getattr(attention, "sliding_window", None)
        if not hasattr(attention, "sliding_window"):
            window = getattr(attention.config, "sliding_window", None)
        return window


PARTS = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The modules in a block, and in two of its modules; attention may have q_norm and k_norm, too."""


def _has(module: nn.Module, parts: set[str]) -> bool:
    found = dict(module.named_children())
    act = type(found.get("act_fn", nn.SiLU())).__name__
    return found.keys() - {"q_norm", "k_norm"} == parts and act in ("SiLU", "SiLUActivation")


class FrozenForward:
    """A block's `forward` by `FrozenBlock` where it can be, else as the block is written."""

    def __init__(self, block: Any, last: bool) -> None:
        self.block, self.written, self.last = block, block.forward, last
        annotation = str(inspect.signature(type(block).forward).return_annotation)
        self.returns_tuple = annotation.lower().startswith(("tuple", "typing.tuple"))

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[1, N, hidden] -> [1, N, hidden]; in the last block, those of the tokens at `wanted` alone."""
        wanted = kwargs.pop("wanted", None)
        window, weights = Weights.window(self.block.self_attn), Weights.of(self.block)
        if weights is None or (window is not None and window < kwargs["longest"]):
            return self.written(hidden_states, *args, **kwargs)
        cos, sin = (part[0] for part in kwargs["position_embeddings"])
        given = (hidden_states[0], weights, cos, sin, kwargs["starts"], wanted if self.last else None)
        out = FrozenBlock.apply(*given)[None]  # type: ignore[no-untyped-call]
        return (out,) if self.returns_tuple else out


def write_out(model: Any) -> bool:
    """Let the blocks of a transformers model compute by `FrozenBlock`; whether they are of its kind."""
    blocks: Any = getattr(model.base_model, "layers", ())
    if not blocks or any(Weights.of(block) is None for block in blocks):
        return False
    for block in blocks:
        block.forward = FrozenForward(block, last=block is blocks[-1])
    return True


def ends_early(model: Any) -> bool:
    """Whether the last block gives the hidden states of `wanted` tokens alone."""
    blocks: Any = getattr(model.base_model, "layers", ())
    return len(blocks) > 0 and isinstance(vars(blocks[-1]).get("forward"), FrozenForward)


class FrozenBlock(torch.autograd.Function):
    """x [N, H] -> the block's output [N, H], or of the tokens at `wanted` alone; only x takes a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: Weights,
        cos: torch.Tensor,
        sin: torch.Tensor,
        starts: torch.Tensor,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        n = len(x)
        r1 = _rms(x, w.eps)
        h = (x * r1).mul_(w.first_norm)
        q, k, v = ((h @ weight.T).view(n, -1, w.width) for weight in (w.q, w.k, w.v))
        cos, sin = cos[:, None], sin[:, None]
        normed_q, rq = _normed(q, w.q_norm, w.eps)
        normed_k, rk = _normed(k, w.k_norm, w.eps)
        attention = Attention(starts, w.scale)
        attended, kept = attention.forward(_turn(normed_q, cos, sin), _turn(normed_k, cos, sin), v)
        attended = attended.flatten(1)
        if wanted is not None:
            y = torch.addmm(x[wanted], attended[wanted], w.o.T)
        else:
            y = torch.addmm(x, attended, w.o.T)
        r2 = _rms(y, w.eps)
        h = (y * r2).mul_(w.second_norm)
        gate, up = h @ w.gate.T, h @ w.up.T
        out = torch.addmm(y, F.silu(gate).mul_(up), w.down.T)
        if ctx.needs_input_grad[0]:
            ctx.w, ctx.attention = w, attention
            ctx.save_for_backward(x, r1, q, k, rq, rk, cos, sin, y, r2, gate, up, wanted, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        x, r1, q, k, rq, rk, cos, sin, y, r2, gate, up, wanted, *kept = ctx.saved_tensors
        w, gradient = ctx.w, outputs[0]
        of_product = gradient @ w.down
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        of_h = (of_gate @ w.gate).addmm_(of_product.mul_(F.silu(gate)), w.up)
        of_y = _norm_backward(of_h, y, r2, w.second_norm).add_(gradient)
        of_attended = of_y @ w.o
        if wanted is not None:
            of_y = torch.zeros_like(x).index_copy_(0, wanted, of_y)
            of_attended = x.new_zeros(len(x), len(w.q)).index_copy_(0, wanted, of_attended)
        of_q, of_k, of_v = ctx.attention.backward(of_attended.view_as(q), k.shape[1], kept)
        of_q = _norm_backward(_turn(of_q, cos, -sin), q, rq, w.q_norm)
        of_k = _norm_backward(_turn(of_k, cos, -sin), k, rk, w.k_norm)
        of_h = of_q.flatten(1) @ w.q
        of_h.addmm_(of_k.flatten(1), w.k).addmm_(of_v.flatten(1), w.v)
        return _norm_backward(of_h, x, r1, w.first_norm).add_(of_y), None, None, None, None, None


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / root mean square of the last dimension, which stays as 1."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    r: torch.Tensor = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return r


def _normed(
    x: torch.Tensor, scale: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x by its own norm, and 1 / root mean square; x as it is where there is no norm."""
    if scale is None:
        return x, None
    r = _rms(x, eps)
    return (x * r).mul_(scale), r


def _norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, r: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """Gradient of x where that of x * r(x) * scale is given, and overwritten."""
    if r is None or scale is None:
        return gradient
    gradient = gradient.mul_(scale)
    along = (gradient * x).sum(-1, keepdim=True).mul_(r**3).div_(x.shape[-1])
    return gradient.mul_(r).addcmul_(x, along, value=-1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [N, heads, d]: halves as pairs. With -sin, of gradients, its inverse."""
    half = x.shape[-1] // 2
    out: torch.Tensor = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Attention:
    """Causal attention inside each of the samples that begin at `starts`, of [N, heads, d]."""

    def __init__(self, starts: torch.Tensor, scale: float) -> None:
        lengths = [length for length in starts.diff().tolist() if length]
        self.lengths, self.scale, self.longest = lengths, scale, max(lengths)
        scores = len(lengths) * self.longest**2
        self.padded = len(lengths) > 1 and scores <= PADDED * sum(length * length for length in lengths)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Output [N, heads, d], and what `backward` needs: five tensors of each call."""
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        kept: list[torch.Tensor] = []
        for some in zip(*map(self._apart, (q, k, v)), strict=True):
            kept += [*some, *FORWARD(*some, 0.0, True, scale=self.scale)[:2]]
        return self._together(kept[3::5]), kept

    def backward(
        self, gradient: torch.Tensor, key_heads: int, kept: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v."""
        parts = [
            BACKWARD(own, *kept[5 * i : 5 * i + 5], 0.0, True, scale=self.scale)
            for i, own in enumerate(self._apart(gradient))
        ]
        of_q, of_k, of_v = (self._together(list(part)) for part in zip(*parts, strict=True))
        shape = (len(of_k), key_heads, -1, of_k.shape[-1])
        return of_q, of_k.view(shape).sum(2), of_v.view(shape).sum(2)

    def _apart(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[N, heads, d] -> samples [samples, heads, L, d], each by itself or all padded."""
        if not self.padded:
            return [part[None].transpose(1, 2) for part in torch.split(x, self.lengths)]
        out = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:]).index_copy_(0, self._places, x)
        return [out.view(-1, self.longest, *x.shape[1:]).transpose(1, 2)]

    def _together(self, samples: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `_apart`, contiguous."""
        if not self.padded:
            return torch.cat([part[0].transpose(0, 1) for part in samples])
        return samples[0].transpose(1, 2).flatten(0, 1).index_select(0, self._places)

    @functools.cached_property
    def _places(self) -> torch.Tensor:
        """Where each token stands in padded samples."""
        within = [torch.arange(length) + k * self.longest for k, length in enumerate(self.lengths)]
        return torch.cat(within)
