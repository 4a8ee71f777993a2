"""Causal attention inside each of the samples that lie end to end in one row of tokens.

On a GPU one kernel does all samples: torch's own variable-length attention (torch >= 2.10), or flash-attn's.
Elsewhere one call per sample. Either way no mask and no score between samples ever exists.
`train.model.packed_model` picks the kernel of a model.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from llava_core.errors import LlavaError

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""Queries [N, heads, d], keys and values [N, key heads, d], starts, longest, scale -> [N, heads, d]."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute packed attention."""

    name: str
    load: Callable[[], Attend]
    """Imports what it needs; ImportError, AttributeError or OSError if that is not there."""
    remedy: str = ""
    """What to do if it is there and the device fails in it."""
    loops: bool = False
    """Whether Python calls the device once per sample, which leaves nothing for a compiler to win."""

    @property
    def interface(self) -> str:
        """Its name in transformers' attention interface, after `install`."""
        return f"llava_{self.name}"

    def install(self) -> None:
        """Offer it to transformers' models under `interface`. Raises as `load` does."""
        AttentionInterface.register(self.interface, functools.partial(packed_attention, attend=self.load()))


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    attend: Attend,
    starts: torch.Tensor,
    longest: int,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: [1, heads, N, d] -> [1, N, heads, d].

    `starts` int32 [samples + 1] are where samples begin, N last; `longest` is at least the longest sample.
    """
    if sliding_window is not None and sliding_window < longest:
        raise LlavaError("this language model's sliding window is shorter than a sample",
                         expected=f"at least {longest} tokens", got=sliding_window)  # fmt: skip
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with a soft cap or sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, starts, longest, scale)[None], None


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """A call of torch's attention for each sample, on any device; the samples are known to Python only."""
    lengths = starts.diff().tolist()
    samples = zip(*(torch.split(x[None].transpose(1, 2), lengths, 2) for x in (q, k, v)), strict=True)
    attended = [
        F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
        for a, b, c in samples
        if a.shape[2]
    ]
    return torch.cat(attended, 2)[0].transpose(0, 1)


@torch.library.custom_op("llava::attend", mutates_args=())
def attend_on_a_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`one_by_one` on a CPU as one operation, so that a compiler need not know the samples' lengths.

    Returns the output [1, heads, N, d] and the logarithms of the softmax's sums [1, heads, N], for the
    backward pass; all heads of k and v are given.
    """
    lengths = starts.diff().tolist()
    samples = zip(*(torch.split(x, lengths, 2) for x in (q, k, v)), strict=True)
    parts = [FORWARD(*sample, 0.0, True, scale=scale) for sample in samples if sample[0].shape[2]]
    out, sums = (torch.cat([part[i] for part in parts], 2).contiguous() for i in range(2))
    return out, sums


@torch.library.custom_op("llava::attend_backward", mutates_args=())
def attend_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k and v."""
    lengths = starts.diff().tolist()
    samples = zip(*(torch.split(x, lengths, 2) for x in (gradient, q, k, v, out, sums)), strict=True)
    parts = [BACKWARD(*sample, 0.0, True, scale=scale) for sample in samples if sample[0].shape[2]]
    return [torch.cat(gradients, 2).contiguous() for gradients in zip(*parts, strict=True)]


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@attend_on_a_cpu.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, scale: float) -> Any:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3])


@attend_backward.register_fake
def _(gradient: torch.Tensor, q: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    return [torch.empty(q.shape, dtype=q.dtype) for _ in range(3)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, starts, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*attend_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None)


attend_on_a_cpu.register_autograd(_gradients, setup_context=_keep)


def on_a_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    every = (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))
    q, k, v = (x[None].transpose(1, 2) for x in every)
    attended: torch.Tensor = attend_on_a_cpu(q, k, v, starts, scale)[0]
    return attended[0].transpose(0, 1)


def torch_varlen() -> Attend:
    """torch.nn.attention.varlen, of torch >= 2.10. Its flags have changed since, so it is asked for them."""
    varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(varlen).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    may_group = "enable_gqa" in known

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        grouped = {"enable_gqa": q.shape[1] != k.shape[1]} if may_group else {}
        out: torch.Tensor = varlen(
            q, k, v, starts, starts, longest, longest, scale=scale, **causal, **grouped
        )
        return out

    return kernel


def flash_varlen() -> Attend:
    """flash-attn's own."""
    varlen = importlib.import_module("flash_attn").flash_attn_varlen_func

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        out: torch.Tensor = varlen(
            q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True
        )
        return out

    return kernel


PER_SAMPLE = Kernel("per-sample", lambda: one_by_one, loops=True)
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "cpu": (Kernel("per-sample-cpu", lambda: on_a_cpu), PER_SAMPLE),
    "mps": (PER_SAMPLE,),
    "cuda": (
        Kernel(
            "torch-varlen", torch_varlen, "install a torch that was built for this GPU; see `llava doctor`"
        ),
        Kernel(
            "flash-attn",
            flash_varlen,
            "pip uninstall flash-attn, or install the wheel that `llava doctor` names",
        ),
        PER_SAMPLE,
    ),
}
"""Kernels for each kind of device, the fastest first; `prepare` takes the first that is there and right.

They are loaded once, before a model is compiled: what is compiled can import nothing.
"""
