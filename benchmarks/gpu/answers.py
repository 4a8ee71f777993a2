"""Answers: tokens a second, and a server under load."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import Clock, Row, in_turns, row, seconds_of
from benchmarks.serve import measure, server_command, started
from llava_align.subprocess_command import run_command
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.generate import generate
from llava_core.language.instructions import QUESTION
from llava_core.language.sampling import Sampling


def decode(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Ours beside transformers' `generate`, after a picture and a question; the time to read the weights."""
    llm, new, device = bench.llm, bench.sizes.new_tokens, bench.device
    endless = dataclasses.replace(llm, eos_ids=frozenset())
    prompt = torch.tensor(bench.conversation().prompt([{"role": "user", "content": QUESTION}]), device=device)
    visual = torch.randn(1, bench.tower.tokens, llm.hidden, device=device) * llm.embedding_rms
    one = torch.cat([visual.to(llm.dtype), llm.embed(prompt)[None]], dim=1)
    weights = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    share = clock.left / len(bench.sizes.batches)
    for batch in bench.sizes.batches:
        inputs = one.repeat(batch, 1, 1)

        def ours(inputs: torch.Tensor = inputs, compiled: CompiledStep | None = None) -> None:
            for _ in generate(endless, inputs, Sampling(max_tokens=new), compiled=compiled):
                pass

        @torch.inference_mode()
        def theirs(inputs: torch.Tensor = inputs) -> None:
            llm.model.generate(inputs_embeds=inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

        kinds: dict[str, Callable[[], None]] = {"ours": ours, "generate": theirs}
        if batch == 1 and device.type == "cuda":
            compiled = CompiledStep(llm)
            warm = seconds_of(device, compiled.warm_up)
            yield Row("compiled step, warm-up", warm, "s")
            kinds["ours, compiled"] = functools.partial(ours, one, compiled)
        for kind in kinds.values():
            seconds_of(device, kind)
        timed = {name: functools.partial(seconds_of, device, kind) for name, kind in kinds.items()}
        for name, seconds in in_turns(timed, share / 2).items():
            rates = [batch * new / s for s in seconds]
            yield row(
                f"{name}, batch {batch}", rates, "tokens/s", "3–5 × generate, compiled" if batch == 1 else ""
            )
        if copy := bench.ceilings.get("copy"):
            yield Row(f"reading the weights once a token, batch {batch}", batch * copy / weights, "tokens/s")


def serve(bench: Bench, clock: Clock) -> Iterator[Row]:
    """Many clients, then one, as benchmarks.serve asks; on a GPU of a compiled server, too."""
    run = bench.folder / "served"
    run_command(
        *("train", "run", "--features", bench.features, "--llm", bench.llm_folder, "--out", run),
        *("--max-steps", 1, "--batch-size", 2, "--compile", "off"),
        echo=False,
    )
    images = bench.folder / "images"
    images.mkdir(exist_ok=True)
    for number, picture in enumerate(bench.pictures[:16]):
        (images / f"{number}.jpg").write_bytes(picture)
    given = argparse.Namespace(
        checkpoint=run / "last", vision=bench.vision, llm=bench.llm_folder, images=images,
        clients=bench.sizes.clients, seconds=max(1.0, clock.left / 8), slots=16, prompt=QUESTION,
        max_tokens=bench.sizes.new_tokens,
    )  # fmt: skip
    kinds = ["served", "served compiled"] if bench.device.type == "cuda" else ["served"]
    for given.compile, kind in enumerate(kinds):
        yield from _served(given, kind)


def _served(given: argparse.Namespace, kind: str) -> Iterator[Row]:
    with started(server_command(given)) as server:
        loads = asyncio.run(measure({kind: server}, given))
    for _, clients, load, seconds in loads:
        yield Row(
            f"{kind}, {clients} at a time: answers",
            len(load.whole) / seconds,
            "answers/s",
            note=f"{len(load.lost)} lost",
        )
        yield Row(f"{clients} at a time: tokens", load.tokens / seconds, "tokens/s")
        first = sorted(load.first)
        yield Row(
            f"{clients} at a time: first token, p50", statistics.median(first), "s",
            note=f"p99 {first[int(0.99 * len(first))]:.3f} s",
        )  # fmt: skip
