"""What the lessons of docs/learn share: pictures of the world, their features, a trained projector, and the
check of an exercise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from llava_align.commands import extract, train
from llava_align.config import MODELS
from llava_align.demo.world.captions import caption
from llava_align.demo.world.dataset import draw, split_scenes
from llava_align.demo.world.scene import Scene
from llava_core.cli.console import show
from llava_core.cli.translation import translated

warnings.filterwarnings("ignore", message="IProgress not found")  # from tqdm in a notebook without widgets

ROWS = {"train": 640, "held-out": 64}
"""Pictures of each split."""
SEED = 0
ANSWERS = {
    "features-1": (30.26, 0.01),
    "features-2": (0.98, 0.03),
    "projector-1": (1_837_056, 0.0),
    "projector-2": (1.89, 0.15),
    "masking-1": (7, 0.0),
    "packing-1": (0.6, 0.01),
    "schedules-1": (1e-3, 0.01),
    "schedules-2": (1, 0.0),
    "grounding-1": (1.36, 0.15),
    "stage-2-1": (262_144, 0.0),
    "stage-2-2": (0.97, 0.1),
    "scaling-1": (1_600, 0.01),
    "scaling-2": (0.674, 0.03),
}
"""Right answers of exercises, and the share by which an answer may differ: measured ones do from machine to
machine."""


@dataclasses.dataclass(frozen=True)
class Split:
    images: Path
    """Folder of the pictures, each beside a text file with its caption."""
    pictures: list[Path]
    scenes: list[Scene]
    """What each picture shows."""
    features: Path
    """Folder of the feature shard; its rows are in the order of `pictures`."""


@dataclasses.dataclass(frozen=True)
class Lessons:
    out: Path
    """Folder of all that lessons write."""
    vision: Path
    """The world's small vision encoder: 37 tokens of width 128 a picture."""
    llm: Path
    """The world's small language model, of width 128."""
    train: Split
    held_out: Split
    checkpoint: Path
    """A linear projector, trained on `train` for 40 steps."""

    def fresh(self, name: str) -> Path:
        """A folder to write to, without what an earlier run of the lesson left there."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        return self.out / name


def prepare(out: str | Path = "lessons-out") -> Lessons:
    """Draw, encode and train once, in half a minute on two CPU cores; afterwards only return the paths.

    An interrupted call is continued by the next one.
    """
    out = Path(out)
    vision, llm = MODELS / "vision", MODELS / "llm"
    train_split, held_out = _split(out, "train"), _split(out, "held-out")
    with quiet():
        for split in (train_split, held_out):
            extract(split.images, vision=vision, out=split.features)
        trained = train(
            train_split.features,
            eval_features=held_out.features,
            llm=llm,
            out=out / "run",
            recipe="fast",
            epochs=1,
            max_steps=40,
            eval_every=20,
            seed=SEED,
        )
    return Lessons(out, vision, llm, train_split, held_out, trained.checkpoint)


def _split(out: Path, name: str) -> Split:
    """A split of the world, drawn if its last caption is not there."""
    images, rows, rng = out / "pictures" / name, ROWS[name], random.Random(f"{name}/{SEED}")
    scenes, paths = split_scenes(name, rows, SEED), [images / f"{row:05d}.jpg" for row in range(rows)]
    if not paths[-1].with_suffix(".txt").exists():
        draw(images, rows, rng)
        for path, scene in zip(paths, scenes, strict=True):
            path.with_suffix(".txt").write_text(caption(scene, rng), encoding="utf-8")
    return Split(images, paths, scenes, out / "features" / name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what commands print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def check(answer: float | None, right: float | str, tolerance: float = 0.01) -> None:
    """Print whether an exercise's answer is right, within a share of it; None is no answer yet.

    `right` is what the answer should be, or a name in ANSWERS, which has its own tolerance.
    """
    expected, within = ANSWERS[right] if isinstance(right, str) else (right, tolerance)
    if answer is None:
        show(translated("not answered yet: write your answer in place of None"))
        return
    try:
        value = float(answer)
    except (TypeError, ValueError):
        show(translated(f"an answer is a number; got {answer!r}"))
        return
    given = f"{value:,.7g}"
    if math.isclose(value, expected, rel_tol=within):
        show(translated(f"right: {given}"))
    else:
        show(translated(f"{given} is too low" if value < expected else f"{given} is too high"))
