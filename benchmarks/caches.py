"""Several caches from one download, beside their parts: python -m benchmarks.caches

The same pictures from a local server, by each encoder and layer alone and by all of them at once, in turns.
CPU time of the process: on shared cores it is what the work costs.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from benchmarks.extract import header
from benchmarks.photo_server import DRAWN, photo, serving
from extract.config import RunConfig
from extract.open_shard import OpenShard
from extract.pipeline import run_pipeline
from llava_align.synthetic_reference import write_vision
from llava_core.cli.console import progress, table
from llava_core.network.async_tasks import run_async
from llava_core.shards.writer import ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower, encode_layers


@dataclasses.dataclass(frozen=True)
class Settings:
    images: int = 48
    """Pictures a pass."""
    repeat: int = 3
    """Passes of each kind."""
    layers: tuple[int, ...] = (-2, 6)
    """Layers besides the last."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_vision(folder / "clip")
        write_dinov2(folder / "dinov2")
        towers: list[VisionTower] = []
        for name in ("clip", "dinov2"):
            first = open_vision_tower(folder / name)
            others = [first.at(layer) for layer in settings.layers]
            towers += [first, *(tower for tower in others if tower)]
        drawn = [photo(2250, 1500, seed) for seed in range(DRAWN)]
        with serving(drawn, 0.05) as base:
            compare(settings, folder, towers, [f"{base}/{i}" for i in range(settings.images)], drawn)


def write_dinov2(folder: Path) -> None:
    """DINOv2-small with random weights, and its processor at 224 pixels."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=14)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=224).save_pretrained(folder)


def compare(
    settings: Settings, folder: Path, towers: Sequence[VisionTower], urls: list[str], drawn: list[bytes]
) -> None:
    encoders = [[tower for tower in towers if tower.network is first.network] for first in towers]
    encoders = [group for k, group in enumerate(encoders) if group not in encoders[:k]]
    pixels = {
        id(group[0].network): [
            group[0].preprocess.decode_image(drawn[i % DRAWN]).pixels for i in range(settings.images)
        ]
        for group in encoders
    }

    def encode(group: list[VisionTower]) -> None:

        for start in range(0, settings.images, 16):
            encode_layers(group, torch.from_numpy(np.stack(pixels[id(group[0].network)][start : start + 16])))

    def extract(towers: Sequence[VisionTower]) -> None:
        config = RunConfig(data="", out=folder, vision=folder, allow_private=True, batch_size=16)
        openers = [functools.partial(open_one, folder, tower, urls) for tower in towers]
        run_async(run_pipeline(towers, config, [openers], progress(None, "rows"), lambda *_: None))

    kinds: dict[str, Callable[[], None]] = {}
    for group in encoders:
        name = group[0].encoder["model_id"]
        kinds[f"{name}: encode, last layer"] = functools.partial(encode, group[:1])
        kinds[f"{name}: encode, {len(group)} layers"] = functools.partial(encode, group)
        kinds[f"{name}: a cache of the last layer"] = functools.partial(extract, group[:1])
    kinds[f"all {len(towers)} caches at once"] = lambda: extract(towers)
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(settings.repeat + 1):  # the first warms up
        for kind, measure in kinds.items():
            before = time.process_time()
            measure()
            if repeat:
                cpu[kind].append(1000 * (time.process_time() - before) / settings.images)
    spent = {kind: statistics.median(values) for kind, values in cpu.items()}
    lines = [(kind, f"{spent[kind]:.1f}", f"{min(v):.1f} – {max(v):.1f}") for kind, v in cpu.items()]
    print(table(lines, ("", "CPU, ms an image", "least – most")))
    *_, whole = spent.values()
    one, layers = list(spent.values())[:3], [v for k, v in spent.items() if "layers" in k]
    parts = one[2] - one[0] + sum(layers)
    print(f"at once / (download + decode + each encoder once): {whole / parts:.3f}")
    alone = sum(v for k, v in spent.items() if "a cache of" in k) * len(towers) / len(encoders)
    print(f"at once / each cache by itself (as for the last layer): {whole / alone:.3f}")


def open_one(folder: Path, tower: VisionTower, urls: list[str]) -> OpenShard:
    path = folder / f"{time.monotonic_ns()}.h5"
    captions = ["一张图"] * len(urls)
    return OpenShard(ShardWriter(path, header(tower, captions, urls)), urls, captions)


if __name__ == "__main__":
    main()
