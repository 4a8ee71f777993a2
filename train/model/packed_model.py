"""A frozen language model made ready for rows of packs: its attention exchanged, checked, and compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from llava_core.cli.console import say
from llava_core.device import is_device_failure, is_memory_full
from llava_core.errors import LlavaError, first_line
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import IGNORE, Example
from llava_core.types import JsonDict
from train.config import Compile
from train.data.packing import Packing, pack
from train.model.blocks import as_written, compile_blocks, original_attention, recompute_activations
from train.model.frozen_block import write_out
from train.model.loss import forward_blocks
from train.model.packed_attention import KERNELS, Kernel

LENGTHS = [24, 17, 9]
"""Tokens of the samples by which a kernel is checked."""
FACTOR = 2.0
"""Most distance of a kernel from fp32, relative to that of the model's own attention in its type. Right ones
reach 1.1 (logits) and 1.2 (gradients); a scale wrong by a tenth 1.7 and 2.9 (benchmarks/RESULTS.md)."""
FLOOR = {"logits": 1e-4, "gradients": 1e-3}
"""Relative distances that are always near enough: the rounding of fp32."""
BLURRED = 0.25
"""A type that is further from fp32 than this hides a wrong kernel."""

Outputs = dict[str, torch.Tensor]
"""`logits` [N, vocabulary] of the checked samples and the `gradients` [N, hidden] that they send to the
embeddings, fp32."""
Distances = dict[str, float]
"""Relative distances to the fp32 model's outputs, by the same names."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """How a language model takes packs, and what was measured to choose it."""

    attention: str
    """Name of the kernel."""
    distances: Distances
    own: Distances
    """Distances from fp32 of the model's own attention, in the model's type."""
    passed_over: dict[str, str]
    """Faster kernels -> why they were not taken."""
    compiled: bool = False

    def figures(self) -> JsonDict:
        """For metrics.jsonl: flat, numbers and words."""
        return {
            "attention": self.attention,
            **{f"attention_{name}_distance": value for name, value in self.distances.items()},
            **{f"own_{name}_distance": value for name, value in self.own.items()},
            "attention_passed_over": "; ".join(f"{name}: {why}" for name, why in self.passed_over.items()),
            "compiled": self.compiled,
        }


def prepare(llm: LanguageModel, compiled: Compile = "off", recomputes: bool = False) -> Prepared:
    """Let the language model take packs, by the fastest attention that is right here, and say which.

    With `recomputes`, its blocks' activations are computed again in the backward pass instead of kept.

    A kernel is right if packed samples give the logits and gradients of the same samples alone: no further
    from the fp32 model than FACTOR times what the model's own attention is in the model's type.

    Raises LlavaError if none is: a head of more than one matrix, layers other than attention, or attention
    of its own kind would make the loss silently wrong; also if the GPU fails in one. Out of memory is
    raised as torch does.
    """
    exact, own = _references(llm)
    dtype = str(llm.dtype).removeprefix("torch.")
    if not max(own.values()) < BLURRED:
        raise LlavaError(
            f"the language model in {dtype} is too far from fp32 to be checked",
            expected=f"logits and gradients within {BLURRED:.0%}",
            got=_shown(own),
            do="train with --device cpu, which computes in fp32",
        )
    passed_over: dict[str, str] = {}
    for kernel in KERNELS[llm.device.type]:
        try:
            kernel.install()
        except (ImportError, AttributeError, OSError) as error:
            passed_over[kernel.name] = f"cannot be imported: {first_line(error)}"
            continue
        llm.model.config._attn_implementation = kernel.interface
        distances = _distances(llm, kernel, exact)
        if not (reason := distances if isinstance(distances, str) else _fault(distances, own)):
            assert isinstance(distances, dict)
            break
        passed_over[kernel.name] = reason
    else:
        raise LlavaError(
            f"this trainer cannot pack samples for a {llm.identity.architecture}",
            expected="plain causal attention and a plain vocabulary head, as in Qwen3 or Llama",
            got=reason,
        )
    for name, why in passed_over.items():
        say(f"attention: not {name}, which {why}")
    beside = f"; the model's own in {dtype}: {_shown(own)}" if llm.dtype != torch.float32 else ""
    say(f"attention: {kernel.name}; distance from fp32: {_shown(distances)}{beside}")
    prepared = Prepared(kernel.name, distances, own, passed_over)
    # Where it pays: on a GPU, unless the attention is a loop of Python's.
    if compiled == "on" or (compiled == "auto" and llm.device.type != "cpu" and not kernel.loops):
        prepared = _compiled(llm, prepared, exact, must=compiled == "on")
    elif llm.device.type == "cpu":
        _written_out(llm, kernel, exact, own)
    if recomputes:
        recompute_activations(llm)
    return prepared


def _compiled(llm: LanguageModel, prepared: Prepared, exact: Outputs, must: bool) -> Prepared:
    """The model compiled, if it then gives the same, else as it was, with a line that says why.

    Raises LlavaError in that case if it `must`.
    """
    kernel = next(k for k in KERNELS[llm.device.type] if k.name == prepared.attention)
    if not (reason := compile_blocks(llm)):
        distances = _distances(llm, kernel, exact)
        reason = distances if isinstance(distances, str) else _fault(distances, prepared.own)
    if not reason:
        return dataclasses.replace(prepared, compiled=True)
    if must:
        raise LlavaError("cannot compile the language model", got=reason, do="leave out --compile on")
    as_written(llm)
    say(f"the language model is not compiled: {reason}")
    return prepared


def _written_out(llm: LanguageModel, kernel: Kernel, exact: Outputs, own: Distances) -> None:
    """Let blocks of Llama's kind compute by `FrozenBlock`, if they then give the same, or say why not."""
    if not write_out(llm.model):
        return
    distances = _distances(llm, kernel, exact)
    if reason := distances if isinstance(distances, str) else _fault(distances, own):
        as_written(llm)
        say(f"the language model's blocks are not written out: {reason}")


def _references(llm: LanguageModel) -> tuple[Outputs, Distances]:
    """Outputs of the fp32 model for each sample alone, and how far the model's own attention is from them
    in its type: the further of its two kinds."""
    with original_attention(llm):
        if llm.dtype == torch.float32:
            exact = _reference_logits(llm, llm.dtype)
        else:
            with _widened(llm.model):
                exact = _reference_logits(llm, torch.float32)
    own = dict.fromkeys(exact, 0.0)
    for kind in ("sdpa", "eager"):
        with original_attention(llm, kind):
            for name, distance in _relative(_reference_logits(llm, llm.dtype), exact).items():
                own[name] = distance if not distance <= own[name] else own[name]  # NaN stays
    return exact, own


def _reference_logits(llm: LanguageModel, dtype: torch.dtype) -> Outputs:
    """Logits and gradients of each sample of LENGTHS by itself, its embeddings in `dtype`."""
    logits, gradients = [], []
    for ids in _samples(llm):
        embedded = llm.embed(ids)[None].to(dtype).requires_grad_()
        logits.append(llm.model(inputs_embeds=embedded, use_cache=False).logits[0])
        gradients.append(_gradient(logits[-1], embedded))
    return {"logits": torch.cat(logits).detach().float(), "gradients": torch.cat(gradients).float()}


def _packed(llm: LanguageModel) -> Outputs:
    """Logits and gradients of the same samples in one row."""
    ids = _samples(llm)
    words = [Example(part.tolist(), [IGNORE] * len(part), cut=False) for part in ids]
    row = Packing(sum(LENGTHS)).row([(0, pack(torch.zeros(len(ids), 0, 1, device=llm.device), 0, words))])
    embedded = llm.embed(torch.cat(ids))[None].requires_grad_()
    logits = forward_blocks(llm, embedded[0], row) @ llm.head.T
    return {"logits": logits.detach().float(), "gradients": _gradient(logits, embedded).float()}


def _distances(llm: LanguageModel, kernel: Kernel, exact: Outputs) -> Distances | str:
    """Distances of packed samples to `exact`, or why the kernel cannot take them."""
    try:
        return _relative(_packed(llm), exact)
    except (AttributeError, ImportError, LlavaError, RuntimeError, TypeError, ValueError) as error:
        if is_memory_full(error):
            raise
        if is_device_failure(error):
            what = f"{llm.device} failed in the attention kernel {kernel.name}"
            raise LlavaError(what, got=first_line(error), do=kernel.remedy or "see `llava doctor`") from None
        return f"cannot take this model: {first_line(error)}"


def _fault(distances: Distances, own: Distances) -> str:
    """Why outputs so far from fp32 are wrong, where the model's own are `own` from it; "" if they are not."""
    for name, distance in distances.items():
        if not distance < (near := max(FLOOR[name], FACTOR * own[name])):
            return f"gives {name} {distance:.1%} away from those of samples alone (at most {near:.2g})"
    return ""


def _relative(got: Outputs, exact: Outputs) -> Distances:
    return {name: float((got[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


def _shown(distances: Distances) -> str:
    return ", ".join(f"{name} {distance:.2%}" for name, distance in distances.items())


def _samples(llm: LanguageModel) -> list[torch.Tensor]:
    """Token ids of words: embeddings of special tokens may be untrained, where no type is exact."""
    words: list[int] = llm.tokenizer("".join(INSTRUCTIONS), add_special_tokens=False)["input_ids"]
    ids = torch.tensor((words * sum(LENGTHS))[: sum(LENGTHS)], device=llm.device)
    return list(torch.split(ids, LENGTHS))


def _gradient(logits: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)[0][0]


@contextmanager
def _widened(model: Any) -> Iterator[None]:
    """Every module that has weights computes in fp32 with them, one module's at a time: no second model."""
    modules = [m for m in model.modules() if m._parameters and not isinstance(m, torch.nn.Embedding)]
    own = {module: vars(module)["forward"] for module in modules if "forward" in vars(module)}
    for module in modules:
        module.forward = _in_fp32(module, module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
        for module, forward in own.items():
            module.forward = forward


def _in_fp32(module: torch.nn.Module, forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        kept = dict(module._parameters)
        module._parameters.update({name: p if p is None else p.float() for name, p in kept.items()})  # type: ignore[misc]
        try:
            return forward(*(a.float() if torch.is_tensor(a) else a for a in args), **kwargs)
        finally:
            module._parameters.update(kept)

    # The backward pass widens them anew, so that none of the wide weights is kept for it.
    return lambda *args, **kwargs: checkpoint(
        run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )
