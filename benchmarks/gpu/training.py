"""Training: is it right, how fast is a step, what is it made of, and how much memory does it take?"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import Clock, Row, in_turns, median_of, row, seconds_of
from benchmarks.together import seconds_together
from benchmarks.train import Settings, open_bench, peak, reset_peak
from llava_align.config import MODELS
from llava_align.subprocess_command import run_command
from llava_align.synthetic_reference import write_features
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.projector.projector import build_projector
from llava_core.types import JsonDict
from train.data.packing import Packing
from train.data.samples import answer_tokens
from train.flops import Work
from train.model.loss import head_loss, summed_losses
from train.model.packed_model import compilations, prepare
from train.run import train

KINDS = {
    "GEMM": r"gemm|cutlass|nvjet|xmma|cublas|wgmma|splitK",
    "attention": r"flash|fmha|attention|attend|softmax_.*sdpa",
    "copies": r"memcpy|memset",
    "optimizer": r"adam|multi_tensor|foreach",
}
"""Of kernels, by their names; the others are elementwise."""
PREDICTED = {"GEMM": "18.5", "attention": "2.5", "elementwise": "50 eager, 7.4 compiled", "optimizer": "0.7"}
"""Milliseconds a step on an H100."""
BATCH = {"reference": 16, "small": 4}


def audit(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Which kernel, how near fp32, and whether a short run on the device has the losses of one on the CPU."""
    shared = bench.shared("off")
    prepared = prepare(shared.llm, "off")
    yield Row(
        "attention", prepared.attention, note="; ".join(f"{k}: {v}" for k, v in prepared.passed_over.items())
    )
    for name, value in prepared.distances.items():
        yield Row(
            f"{name}, distance from fp32",
            value,
            note=f"the model's own in its type: {prepared.own[name]:.3g}",
        )
    features = bench.folder / "demo-features"
    features.mkdir(exist_ok=True)
    if not list(features.iterdir()):
        write_features(features / "a.h5", 64, {"model_id": "random", "tokens": 37, "width": 128})
    losses: dict[str, list[float]] = {}
    devices = ["cpu", bench.device.type] if bench.device.type != "cpu" else ["cpu"]
    for device in devices:
        out = bench.folder / f"audit-{device}"
        run_command(
            *(
                "train",
                "run",
                "--features",
                features,
                "--llm",
                MODELS / "llm",
                "--out",
                out,
                "--device",
                device,
            ),
            *("--max-steps", 20, "--epochs", 99, "--batch-size", 4, "--log-every", 1, "--compile", "off"),
            echo=False,
        )
        losses[device] = [line["loss"] for line in read_json_lines(out / "metrics.jsonl") if "loss" in line]
    first = losses["cpu"]
    others = losses[devices[-1]]
    furthest = max(abs(a - b) for a, b in zip(first, others, strict=True))
    yield Row(
        "20 steps' loss, furthest from the CPU's in fp32", furthest, "nats",
        note=f"{others[0]:.3f} → {others[-1]:.3f} on {devices[-1]}",
    )  # fmt: skip


def step(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Our step beside the ways people train a projector, all from the same samples, in turns."""
    small, batch = bench.shape == "small", BATCH[bench.shape]
    width, height = bench.sizes.picture
    settings = Settings(
        shape="small" if small else "reference",
        samples=batch * bench.sizes.passes,
        batch_size=batch,
        width=width,
        height=height,
        workers=2 if small else 8,
        compile="off" if small else "auto",
        trainer=True,
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
        predicted = {"(f) ours, not compiled": "197", "(d) ours": "413"}
        for kind, seconds in passes.items():
            rates = [settings.samples / s for s in seconds]
            middle = sorted(seconds)[len(seconds) // 2]
            use = operations / middle / own.member.prediction.matmul_rate
            note = f"{tokens / middle:,.0f} tokens/s, MFU {use:.1%}, peak {peaks[kind] / 2**30:.2f} GiB"
            yield row(kind, rates, "samples/s", predicted.get(kind, ""), note)
        yield Row("graphs compiled", compilations() - before, predicted="2–6")


def breakdown(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Milliseconds of a step by kinds of kernels, and of its parts alone at the same shapes."""
    batch = BATCH[bench.shape]
    shared = bench.shared("auto")
    llm = shared.llm
    projector = build_projector("linear", bench.tower.width, llm.hidden).to(bench.device)
    some = bench.batch(batch)
    unit = 256 if shared.compiled else 1

    def one() -> None:
        for packed in Packing(1 << 20, unit).rows(some.to(bench.device), [bench.tower.tokens]):
            torch.stack(summed_losses(llm, [projector], packed)).sum().backward()  # type: ignore[no-untyped-call]

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


def end_to_end(bench: Bench, clock: Clock) -> Iterator[Row]:
    """`train run --recipe fast` with evaluations: compile cache cold, then warm, then not compiled."""
    cache = bench.folder / "inductor"
    begun = False
    for name, flags in (("cold", ()), ("warm", ()), ("not compiled", ("--compile", "off"))):
        if begun and clock.left < 0:
            yield Row(f"train run, {name}", "not begun: its time is used up")
            continue
        begun, out, began = True, bench.config().out, time.monotonic()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        steps = bench.sizes.steps
        told: JsonDict = run_command(
            *(
                "train",
                "run",
                "--recipe",
                "fast",
                "--features",
                bench.features,
                "--eval-features",
                bench.held_out,
            ),
            *(
                "--llm",
                bench.llm_folder,
                "--out",
                out,
                "--max-steps",
                steps,
                "--epochs",
                1000,
                "--eval-captions",
                0,
            ),
            *("--eval-every", max(1, steps // 2), "--batch-size", BATCH[bench.shape], *flags),
            echo=False,
        )
        seconds = time.monotonic() - began
        per_s = told.get("steps_per_s", float("nan"))
        note = (
            f"{per_s:.2f} steps/s once begun, planned {told.get('planned_steps_per_s', float('nan')):.2f}; "
            f"1,250 steps would take {seconds + (1250 - steps) / per_s:.0f} s"
        )
        yield Row(
            f"train run, {steps} steps, {name}",
            seconds,
            "s",
            predicted="of 1,250 steps: 50, and 50–200 to compile",
            note=note,
        )


def sweep(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Samples per second of runs of unlike learning rates in one pass; of one run, as they do one by one.

    Each number of runs has its own length of rows, for which the model is compiled: they cannot take turns.
    """
    shared = bench.shared("auto")
    one = bench.config(max_steps=bench.sizes.passes, batch_size=BATCH[bench.shape], micro_tokens=1 << 20)
    share, single = clock.left / len(bench.sizes.together), 0.0
    for members in bench.sizes.together:
        runs = [dataclasses.replace(one, lr=1e-3 * (k + 1)) for k in range(members)]
        began = time.monotonic()
        seconds_together(bench.folder, shared, runs)  # warms up, and compiles
        left = share - (time.monotonic() - began)
        again = functools.partial(seconds_together, bench.folder, shared, runs)
        seconds = in_turns({"": again}, left, most=3)[""]
        rates = [members * one.batch_size * bench.sizes.passes / s for s in seconds]
        middle = sorted(rates)[len(rates) // 2]
        single = single or middle
        name = f"{members} run{'s' if members > 1 else ''} together"
        yield row(
            name,
            rates,
            "samples/s",
            "≥ 55 % MFU of 4" if members == 4 else "",
            f"{middle / single:.2f} × one",
        )


def tokens(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Share of the matmul rate that a pass of so many tokens reaches, beside a product of as many rows."""
    shared = bench.shared("auto")
    llm = shared.llm
    projector = build_projector("linear", bench.tower.width, llm.hidden).to(bench.device)
    work, visual = Work.of(llm.model, projector), bench.tower.tokens
    share = clock.left / len(bench.sizes.tokens)
    ceiling = bench.ceilings.get("matmul")
    for wanted in bench.sizes.tokens:
        if clock.left < 0:
            yield Row(f"{wanted:,} tokens", "not begun: its time is used up")
            continue
        batch = bench.batch(max(1, round(wanted / (visual + 120))))
        lengths = [visual + len(example.ids) for example in batch.examples]

        def one(batch=batch) -> None:  # type: ignore[no-untyped-def]
            for packed in Packing(1 << 24, 256 if shared.compiled else 1).rows(
                batch.to(bench.device), [visual]
            ):
                torch.stack(summed_losses(llm, [projector], packed)).sum().backward()  # type: ignore[no-untyped-call]

        operations = work.operations(lengths, visual * len(lengths), answer_tokens(batch.examples))
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


def memory(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Peaks beside what `train plan` expects."""
    shared = bench.shared("off")
    batch = BATCH[bench.shape]
    cases = [(batch, 16_384, 1), (4 * batch, 65_536, 1), (batch, 65_536, max(bench.sizes.together))]
    for size, micro, members in cases:
        flags = {"batch_size": size, "micro_tokens": micro, "max_steps": 2, "resident": "disk"}
        runs = [bench.config(**flags) for _ in range(members)]
        reset_peak(bench.device)
        (first, *others) = train(runs, shared)
        for outcome in (first, *others):
            if isinstance(outcome, LlavaError):
                raise outcome
        assert isinstance(first, dict)
        planned = first.get("planned_memory_bytes")
        note = f"planned {planned / 2**30:.2f} GiB" if planned else "planned one by one only"
        name = f"batch {size}, {micro:,} tokens a pass, {members} run{'s' if members > 1 else ''}"
        yield Row(name, peak(bench.device) / 2**30, "GiB", note=note)
