"""Images a second: encoding alone, decoding alone, and `extract run`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import ChineseCLIPVisionConfig, ChineseCLIPVisionModel

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import Clock, Row, in_turns, median_of, row, seconds_of
from llava_align.subprocess_command import run_command
from llava_align.synthetic_reference import VIT_B_16
from llava_core.launcher_variables import cpu_cores
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower

BATCH = {"reference": 256, "small": 4}


def encode(bench: Bench, clock: Clock) -> Iterator[Row]:
    device, batch, share = bench.device, BATCH[bench.shape], clock.left / 5
    size = bench.tower.preprocess.size
    host = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    pixels = host.to(device)
    kinds: dict[str, Callable[[], object]] = {"ours": lambda: bench.tower.encode(pixels)}
    if device.type == "cuda":
        pinned = host.pin_memory()
        kinds["ours, pageable copies both ways"] = lambda: bench.tower.encode(host).half().cpu()
        kinds["ours, pinned to the device, back pageable"] = lambda: bench.tower.encode(pinned).half().cpu()
        half = open_vision_tower(bench.vision, device, torch.float16)
        kinds["fp16"] = lambda: half.encode(pixels)
        last = open_vision_tower(bench.vision, device)
        last.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        kinds["channels last"] = lambda: last.encode(pixels)
        compiled = _compiled(bench.tower)
        kinds["compiled"] = lambda: compiled(pixels)
    if bench.shape == "reference":
        theirs = _transformers(device, bench.tower.dtype)
        kinds["transformers' tower"] = lambda: theirs(
            bench.tower.preprocess.normalise(pixels).to(bench.tower.dtype)
        )
    for kind in kinds.values():
        seconds_of(device, kind)
    timed = {name: functools.partial(seconds_of, device, kind) for name, kind in kinds.items()}
    for name, seconds in in_turns(timed, share).items():
        predicted = "goal 8,000" if name == "ours" else ""
        yield row(f"encode, {name}, batch {batch}", [batch / s for s in seconds], "images/s", predicted)
    bodies, decode = bench.pictures, bench.tower.preprocess.decode_image
    with ThreadPoolExecutor(cpu_cores()) as threads:
        seconds = median_of(device, lambda: list(threads.map(decode, bodies)), share)
    rates = [len(bodies) / s for s in seconds]
    yield row(f"decode on {cpu_cores()} cores", rates, "images/s", "1,000–1,500 on 16")
    folder = _as_files(bench)
    told = run_command(
        *("extract", "run", "--data", folder, "--vision", bench.vision, "--out", bench.folder / "extracted"),
        echo=False,
    )
    rate = told["rows"] / told["seconds"]
    yield Row("`extract run` from local files", rate, "images/s", note=f"bounded by {told['bottleneck']}")


def _compiled(tower: VisionTower) -> Callable[[torch.Tensor], torch.Tensor]:
    tokens = torch.compile(tower._tokens)

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = tokens(tower.preprocess.normalise(pixels).to(tower.dtype))
        return encoded.float()

    return encode


def _transformers(device: torch.device, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Its Chinese-CLIP vision model of the same shape."""
    config = ChineseCLIPVisionConfig(
        hidden_size=VIT_B_16["vision_width"],
        intermediate_size=4 * VIT_B_16["vision_width"],
        num_hidden_layers=VIT_B_16["vision_layers"],
        num_attention_heads=VIT_B_16["vision_width"] // 64,
        image_size=VIT_B_16["image_resolution"],
        patch_size=VIT_B_16["vision_patch_size"],
    )
    model = ChineseCLIPVisionModel(config).to(device, dtype).eval()

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model(pixel_values=pixels).last_hidden_state
        return hidden.float()

    return encode


def _as_files(bench: Bench) -> Path:
    folder = bench.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(bench.pictures):
        (folder / f"{number:05d}.jpg").write_bytes(picture)
        (folder / f"{number:05d}.txt").write_text("一张图")
    return folder
