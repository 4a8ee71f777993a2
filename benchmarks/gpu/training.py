"""Training: is it right, how long does a run take, several at once, and how much memory?"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterator

from benchmarks.gpu.bench import BATCH, Bench
from benchmarks.gpu.rows import Clock, Row, in_turns, row
from benchmarks.together import seconds_together
from benchmarks.trainers import peak, reset_peak
from llava_align.config import MODELS
from llava_align.subprocess_command import run_command
from llava_align.synthetic_reference import write_features
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.types import JsonDict
from train.model.packed_model import prepare
from train.run import train


def audit(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Which kernel, how near fp32, and whether a short run on the device has the losses of one on the CPU."""
    resources = bench.resources("off")
    prepared = prepare(resources.llm, "off")
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
    resources = bench.resources("auto")
    one = bench.config(max_steps=bench.sizes.passes, batch_size=BATCH[bench.shape], micro_tokens=1 << 20)
    share, single = clock.left / len(bench.sizes.together), 0.0
    for members in bench.sizes.together:
        runs = [dataclasses.replace(one, lr=1e-3 * (k + 1)) for k in range(members)]
        began = time.monotonic()
        seconds_together(bench.folder, resources, runs)  # warms up, and compiles
        left = share - (time.monotonic() - began)
        again = functools.partial(seconds_together, bench.folder, resources, runs)
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


def memory(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Peaks beside what `train plan` expects."""
    resources = bench.resources("off")
    batch = BATCH[bench.shape]
    cases = [(batch, 16_384, 1), (4 * batch, 65_536, 1), (batch, 65_536, max(bench.sizes.together))]
    for size, micro, members in cases:
        flags = {"batch_size": size, "micro_tokens": micro, "max_steps": 2, "resident": "disk"}
        runs = [bench.config(**flags) for _ in range(members)]
        reset_peak(bench.device)
        (first, *others) = train(runs, resources)
        for outcome in (first, *others):
            if isinstance(outcome, LlavaError):
                raise outcome
        assert isinstance(first, dict)
        planned = first.get("planned_memory_bytes")
        note = f"planned {planned / 2**30:.2f} GiB" if planned else "planned one by one only"
        name = f"batch {size}, {micro:,} tokens a pass, {members} run{'s' if members > 1 else ''}"
        yield Row(name, peak(bench.device) / 2**30, "GiB", note=note)
