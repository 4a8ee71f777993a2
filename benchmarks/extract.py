"""What bounds `extract`: each stage alone, the whole, and what people do without it.

    python -m benchmarks.extract                      # ViT-B/16, 1500×2250 JPEGs
    python -m benchmarks.extract --memory 20000       # memory over so many small images
    python -m benchmarks.extract --baseline           # and img2dataset, if on the PATH, and one by one

Pictures are drawn once and served by a process of its own, each answer `--latency` seconds late. The stages
and the whole take turns, `--repeat` times each; ratios are those of medians. CPU time is this process's.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.photo_server import DRAWN, photo, serving, with_comment
from extract.config import RunConfig
from extract.open_shard import OpenShard
from extract.pipeline import run_pipeline
from extract.stages.write import WRITE_ROWS
from llava_align.config import MODELS
from llava_align.synthetic_reference import write_vision
from llava_core.cli.console import progress, table
from llava_core.network.async_tasks import run_async
from llava_core.network.fetch import fetch_all
from llava_core.network.fetch_limits import FetchLimits
from llava_core.row_status import Status
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower


@dataclasses.dataclass(frozen=True)
class Settings:
    images: int = 48
    """Pictures a pass."""
    repeat: int = 3
    """Passes of each kind."""
    latency: float = 0.05
    """Seconds that the server waits before it answers."""
    width: int = 2250
    height: int = 1500
    world: bool = False
    """Encode with the demo's small encoder instead of ViT-B/16 with random weights."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    batch_size: int = 64 if torch.cuda.is_available() else 16
    baseline: bool = False
    """Compare with img2dataset, if it is on the PATH, and with one request after another."""
    memory: int = 0
    """Only watch the memory over so many small pictures, with the small encoder."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        if settings.memory:
            watch_memory(settings, Path(folder))
        else:
            compare(settings, Path(folder))


def compare(settings: Settings, folder: Path) -> None:
    vision = MODELS / "vision"
    if not settings.world:
        vision = folder / "vision"
        write_vision(vision)
    tower = open_vision_tower(vision, settings.device)
    drawn = [photo(settings.width, settings.height, seed) for seed in range(DRAWN)]
    bodies = [with_comment(drawn[i % DRAWN], i) for i in range(settings.images)]
    print(f"{settings.images} JPEGs of {settings.width}×{settings.height}, {len(drawn[0]) / 1e3:.0f} kB each")
    with serving(drawn, settings.latency) as base:
        bench = Bench(settings, tower, folder, bodies, [f"{base}/{i}" for i in range(settings.images)])
        kinds: dict[str, Callable[[], float]] = {
            "download alone": bench.download,
            "decode alone": bench.decode,
            "encode alone": bench.encode,
            "write alone": bench.write,
            "whole": bench.whole,
        }
        if settings.baseline:
            kinds["one after another"] = bench.one_after_another
            if bench.img2dataset_works():
                kinds["img2dataset, then encode"] = bench.img2dataset
        bench.whole()  # the first encoding warms up
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(settings.repeat):
            for kind, measure in kinds.items():
                before = time.process_time()
                seconds[kind].append(measure())
                cpu[kind].append(1000 * (time.process_time() - before) / settings.images)
    rates = {kind: settings.images / statistics.median(values) for kind, values in seconds.items()}
    spread = {
        kind: f"{settings.images / max(v):.1f} – {settings.images / min(v):.1f}"
        for kind, v in seconds.items()
    }
    spent = {kind: statistics.median(values) for kind, values in cpu.items()}
    lines = [(kind, f"{rates[kind]:.2f}", spread[kind], f"{spent[kind]:.1f}") for kind in kinds]
    print(table(lines, ("", "images/s", "slowest – fastest", "CPU, ms an image")))
    slowest = min((kind for kind in kinds if kind.endswith("alone")), key=lambda kind: rates[kind])
    print(f"whole / slowest stage alone ({slowest}): {rates['whole'] / rates[slowest]:.3f}")
    stages = sum(spent[kind] for kind in kinds if kind.endswith("alone"))
    print(f"CPU of the stages together / of the whole: {stages / spent['whole']:.3f}")
    for kind in list(kinds)[5:]:
        print(f"whole / {kind}: {rates['whole'] / rates[kind]:.2f}")
    print(f"said of the last pass: {json.dumps(bench.figures)}")


@dataclasses.dataclass
class Bench:
    """One measurement each; all return seconds for `settings.images` pictures."""

    settings: Settings
    tower: VisionTower
    folder: Path
    bodies: list[bytes]
    urls: list[str]
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    passes: int = 0

    @functools.cached_property
    def config(self) -> RunConfig:
        return RunConfig(
            data="",
            out=self.folder,
            vision=self.folder,
            allow_private=True,
            batch_size=self.settings.batch_size,
        )

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        decode = self.tower.preprocess.decode_image
        return np.stack([decode(body).pixels for body in self.bodies])

    @functools.cached_property
    def features(self) -> np.ndarray:
        one = self.tower.encode(self.pixels[:1]).half().cpu().numpy()
        return np.repeat(one, len(self.bodies), axis=0)

    def download(self) -> float:
        limits = FetchLimits(allow_private=True, per_host=self.config.per_host)
        began = time.monotonic()
        fetched = fetch_all(self.urls, limits)
        assert all(f.status is Status.OK for f in fetched)
        return time.monotonic() - began

    def decode(self) -> float:
        began = time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(self.tower.preprocess.decode_image, self.bodies))
        return time.monotonic() - began

    def encode(self) -> float:
        pixels, size = self.pixels, self.settings.batch_size
        began = time.monotonic()
        for start in range(0, len(pixels), size):
            self.tower.encode(pixels[start : start + size]).half().cpu()
        return time.monotonic() - began

    def write(self) -> float:
        features, path = self.features, self._new_path()
        with ShardWriter(path, self._header()) as writer:
            began = time.monotonic()
            for start in range(0, len(features), WRITE_ROWS):
                rows = range(start, min(start + WRITE_ROWS, len(features)))
                writer.write([RowRecord(row, Status.OK, features[row]) for row in rows])
            return time.monotonic() - began

    def whole(self) -> float:
        path, captions = self._new_path(), ["一张图"] * len(self.urls)
        began = time.monotonic()
        self.figures = run_async(
            run_pipeline(
                [self.tower],
                self.config,
                [[lambda: OpenShard(ShardWriter(path, self._header()), self.urls, captions)]],
                progress(None, "rows"),
                lambda shard, seconds: None,
            )
        )
        return time.monotonic() - began

    def one_after_another(self) -> float:
        """As the course project: fetch an image, decode it in full, and encode each 16 of them."""
        size, preprocess = self.tower.preprocess.size, self.tower.preprocess
        batch: list[np.ndarray] = []
        began = time.monotonic()
        for number, url in enumerate(self.urls, 1):
            with urllib.request.urlopen(url) as answer:
                image = Image.open(io.BytesIO(answer.read())).convert("RGB")
            batch.append(np.array(image.resize((size, size), Image.Resampling.BICUBIC)))
            if len(batch) == 16 or number == len(self.urls):
                self.tower._tokens(preprocess.normalise(torch.from_numpy(np.stack(batch)))).half().cpu()
                batch = []
        return time.monotonic() - began

    def img2dataset_works(self) -> bool:
        try:
            return subprocess.run(["img2dataset", "--", "--help"], capture_output=True).returncode == 0
        except FileNotFoundError:
            print("no img2dataset on the PATH")
            return False

    def img2dataset(self) -> float:
        """img2dataset with its own settings to 224×224 files, which are then decoded and encoded."""
        self.passes += 1
        urls, out = self.folder / "urls.txt", self.folder / f"img2dataset-{self.passes}"
        urls.write_text("\n".join(self.urls))
        command = ["img2dataset", "--url_list", urls, "--output_folder", out, "--image_size", "224"]
        command += ["--resize_mode", "no", "--processes_count", str(os.cpu_count()), "--thread_count", "64"]
        began = time.monotonic()
        subprocess.run(list(map(str, command)), capture_output=True, check=True)
        files = sorted(out.rglob("*.jpg"))
        assert len(files) == len(self.urls), f"img2dataset brought {len(files)} of {len(self.urls)}"
        for start in range(0, len(files), self.settings.batch_size):
            batch = files[start : start + self.settings.batch_size]
            pixels = [self.tower.preprocess.decode_image(file.read_bytes()).pixels for file in batch]
            self.tower.encode(np.stack(pixels)).half().cpu()
        return time.monotonic() - began

    def _new_path(self) -> Path:
        self.passes += 1
        return self.folder / f"{self.passes}.h5"

    def _header(self) -> ShardHeader:
        texts = ["一张图"] * len(self.urls)
        return header(self.tower, texts, self.urls)


def header(tower: VisionTower, captions: Sequence[str], urls: Sequence[str]) -> ShardHeader:
    return ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source={},
        tokens=tower.tokens,
        width=tower.width,
        captions=captions,
        urls=urls,
        ids=urls,
    )


def watch_memory(settings: Settings, folder: Path) -> None:
    """Resident memory after each tenth of the rows, over shards of 2000."""
    tower = open_vision_tower(MODELS / "vision", settings.device)
    drawn = [photo(96, 96, seed) for seed in range(DRAWN)]
    shards: list[tuple[int, float]] = []
    print(f"{settings.memory:,} JPEGs of 96×96; resident memory, MB:")

    def finished(shard: Any, seconds: float) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        shards.append((len(shards) + 1, pages * resource.getpagesize() / 1e6))
        print(f"  after {2000 * len(shards):>7,} rows: {shards[-1][1]:.0f}", flush=True)
        shard.path.unlink()

    with serving(drawn, settings.latency) as base:
        config = RunConfig(data="", out=folder, vision=folder, allow_private=True, per_host=64)
        openers = []
        for start in range(0, settings.memory, 2000):
            urls = [f"{base}/{i}" for i in range(start, start + 2000)]
            openers.append([functools.partial(open_shard, tower, folder / f"{start}.h5", urls)])
        began = time.monotonic()
        figures = run_async(
            run_pipeline([tower], config, openers, progress(settings.memory, "rows"), finished)
        )
    print(f"{settings.memory / (time.monotonic() - began):.0f} rows/s; {json.dumps(figures)}")


def open_shard(tower: VisionTower, path: Path, urls: list[str]) -> OpenShard:
    captions = ["一张图"] * len(urls)
    return OpenShard(ShardWriter(path, header(tower, captions, urls)), urls, captions)


if __name__ == "__main__":
    main()
