"""One training step: how fast is it, what is it made of, and how does it grow with its tokens?"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.gpu.bench import BATCH, Bench
from benchmarks.gpu.rows import Clock, Row, in_turns, median_of, row, seconds_of
from benchmarks.train import Settings, open_bench
from llava_core.projector.projector import build_projector
from train.config import Tune
from train.data.batch import answer_tokens
from train.data.packing import Packing
from train.flops import Work
from train.model.blocks import compilations
from train.model.loss import head_loss, packed_losses

KINDS = {
    "GEMM": r"gemm|cutlass|nvjet|xmma|cublas|wgmma|splitK",
    "attention": r"flash|fmha|attention|attend|softmax_.*sdpa",
    "copies": r"memcpy|memset",
    "optimizer": r"adam|multi_tensor|foreach",
}
"""Kinds of kernels, by their names; the others are elementwise."""


PREDICTED = {"GEMM": "18.5", "attention": "2.5", "elementwise": "50 eager, 7.4 compiled", "optimizer": "0.7"}
"""Milliseconds a step on an H100."""


def step(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Our step beside the ways people train a projector, all from the same samples, in turns."""
    predicted = {"(f) ours, not compiled": "197", "(d) ours": "413"}
    yield from _beside(bench, clock, "projector", BATCH[bench.shape], predicted)


def stage2(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Steps of stage 2 beside the course's, in its batches of 4."""
    predicted: dict[Tune, str] = {"lora": "30", "llm": "35"}
    for left, (tune, samples) in zip((2, 1), predicted.items(), strict=True):
        for each in _beside(bench, Clock(clock.left / left), tune, 4, {"(d) ours": samples}):
            yield dataclasses.replace(each, name=f"{tune}: {each.name}")
        bench.forget()


def _beside(
    bench: Bench, clock: Clock, tune: Tune, batch: int, predicted: Mapping[str, str]
) -> Iterator[Row]:
    small = bench.shape == "small"
    width, height = bench.sizes.picture
    settings = Settings(
        shape="small" if small else "reference",
        samples=batch * bench.sizes.passes,
        batch_size=batch,
        tune=tune,
        width=width,
        height=height,
        workers=2 if small else 8,
        compile="off" if small else "auto",
        trainer=tune == "projector",
    )
    folder = bench.folder / f"step-{time.monotonic_ns()}"
    with open_bench(settings, folder, bench.vision, bench.llm_folder) as (own, kinds):
        before = compilations()
        for kind, measure in kinds.items():
            began = time.monotonic()
            measure(1)
            if kind == "(d) ours":
                note = "" if small else "with what it compiles, on a GPU"
                yield Row("ours: first step", time.monotonic() - began, "s", predicted="10–20", note=note)
        peaks: dict[str, int] = {}

        def timed(kind: str) -> float:
            done = kinds[kind](bench.sizes.passes)
            peaks[kind] = max(peaks.get(kind, 0), done.peak)
            return done.seconds

        passes = in_turns({kind: lambda kind=kind: timed(kind) for kind in kinds}, clock.left * 0.8)  # type: ignore[misc]
        operations, tokens = own.work()
        for kind, seconds in passes.items():
            rates = [settings.samples / s for s in seconds]
            middle = sorted(seconds)[len(seconds) // 2]
            use = operations / middle / own.run.prediction.matmul_rate
            note = f"{tokens / middle:,.0f} tokens/s, MFU {use:.1%}, peak {peaks[kind] / 2**30:.2f} GiB"
            yield row(kind, rates, "samples/s", predicted.get(kind, ""), note)
        yield Row("graphs compiled", compilations() - before, predicted="2–6")


def breakdown(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Milliseconds of a step by kinds of kernels, and of its parts alone at the same shapes."""
    batch = BATCH[bench.shape]
    resources = bench.resources("auto")
    llm = resources.llm
    projector = build_projector("linear", bench.tower.width, llm.hidden).to(bench.device)
    some = bench.batch(batch)
    unit = 256 if resources.compiled else 1

    def one() -> None:
        for packed in Packing(1 << 20, unit).rows(some.to(bench.device), [bench.tower.tokens]):
            torch.stack(packed_losses(llm, [projector], packed)).sum().backward()  # type: ignore[no-untyped-call]

    for _ in range(3):
        one()
    taken = median_of(bench.device, one, clock.left / 4)
    yield row("forward and backward", [1000 * s for s in taken], "ms", "81 eager, 39 compiled")
    if bench.device.type == "cuda":
        yield from _kernels(one, taken)
    answers, tokens = (
        answer_tokens(some.examples),
        sum(bench.tower.tokens + len(e.ids) for e in some.examples),
    )
    hidden = torch.randn(answers, llm.hidden, device=bench.device, dtype=llm.dtype, requires_grad=True)
    targets = torch.randint(0, llm.head.shape[0], (answers,), device=bench.device)
    taken = median_of(bench.device, lambda: head_loss(hidden, llm.head, targets), clock.left / 4)
    yield row(f"head and loss alone, {answers} answer tokens", [1000 * s for s in taken], "ms", "5.5")
    matrices = [
        p for name, p in llm.model.base_model.named_parameters() if p.ndim == 2 and "embed" not in name
    ]
    inputs = {
        width: torch.randn(tokens, width, device=bench.device, dtype=llm.dtype)
        for width in {side for p in matrices for side in p.shape}
    }

    @torch.no_grad()
    def products() -> None:
        for matrix in matrices:  # the forward pass, and the gradient of its input
            inputs[matrix.shape[1]] @ matrix.T
            inputs[matrix.shape[0]] @ matrix

    taken = median_of(bench.device, products, clock.left / 2)
    yield row(f"the blocks' matrix products alone, {tokens} tokens", [1000 * s for s in taken], "ms", "18.5")


def _kernels(call: Callable[[], None], taken: list[float]) -> Iterator[Row]:
    """By the profiler: one call's milliseconds by kinds of kernels, its launches and its idle share."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        call()
        torch.cuda.synchronize()
    spent = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    launches = 0
    for event in profiled.events() or ():
        if event.device_type == DeviceType.CUDA:
            kind = next(
                (k for k, names in KINDS.items() if re.search(names, event.name, re.IGNORECASE)),
                "elementwise",
            )
            spent[kind] += event.time_range.elapsed_us() / 1000
            launches += 1
    for kind, ms in spent.items():
        yield Row(f"kernels: {kind}", ms, "ms", predicted=PREDICTED.get(kind, ""))
    yield Row("kernels and copies launched", launches, predicted="3,651 eager, about 900 compiled")
    middle = 1000 * sorted(taken)[len(taken) // 2]
    yield Row("busy share", sum(spent.values()) / middle, note="of the time without the profiler")


def tokens(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Share of the matmul rate by tokens in a pass, beside a matrix product of as many rows."""
    resources = bench.resources("auto")
    llm = resources.llm
    projector = build_projector("linear", bench.tower.width, llm.hidden).to(bench.device)
    visual = bench.tower.tokens
    work = Work.of(llm.model, projector, visual)
    share = clock.left / len(bench.sizes.tokens)
    ceiling = bench.ceilings.get("matmul")
    for wanted in bench.sizes.tokens:
        if clock.left < 0:
            yield Row(f"{wanted:,} tokens", "not begun: its time is used up")
            continue
        batch = bench.batch(max(1, round(wanted / (visual + 120))))
        lengths = [visual + len(example.ids) for example in batch.examples]

        def one(batch=batch) -> None:  # type: ignore[no-untyped-def]
            for packed in Packing(1 << 24, 256 if resources.compiled else 1).rows(
                batch.to(bench.device), [visual]
            ):
                torch.stack(packed_losses(llm, [projector], packed)).sum().backward()  # type: ignore[no-untyped-call]

        operations = work.operations(batch.counts, visual)
        rates = [operations / s for s in median_of(bench.device, one, share / 2)]
        a = torch.randn(sum(lengths), llm.hidden, device=bench.device, dtype=llm.dtype)
        b = torch.randn(llm.hidden, 3 * llm.hidden, device=bench.device, dtype=llm.dtype)
        seconds = seconds_of(bench.device, lambda a=a, b=b: a @ b, times=20)  # type: ignore[misc]
        product = 2 * a.numel() * b.shape[1] / seconds
        if ceiling:
            note = f"a product of as many rows: {product / ceiling:.1%}"
            yield row(f"{sum(lengths):,} tokens", [100 * r / ceiling for r in rates], "% MFU", note=note)
        else:
            yield row(
                f"{sum(lengths):,} tokens", [r / 1e12 for r in rates], "TFLOP/s", note="no ceiling measured"
            )
