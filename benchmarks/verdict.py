"""Do the verdicts of `train run` name what is wrong with a run? python -m benchmarks.verdict --out DIR

    --demo DIR    # where `make demo` has left its features; demo-out if not given

Runs on the demo's world are sabotaged in ways that are known: other words, empty features, too high a rate,
48 pictures, …. With 40 of them the thresholds in train/verdict.py were chosen; 20 others, with other seeds,
rates, projectors and sizes, count how often the verdict is right. A run that is there is not trained again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.reference import command
from llava_align.config import MODELS
from llava_core.cli.console import table
from llava_core.filesystem import read_json_lines
from llava_core.row_status import Status
from llava_core.shards.folder import find_shards
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from train.verdict import Verdict, verdict_of

ONE = "左上方画着一个大的黄色三角形，背景是灰色的。"
Rewrite = Callable[[np.random.Generator, list[str], np.ndarray], tuple[list[str], np.ndarray]]
"""(random, captions, features fp16 [N, T, D]) to what the sabotaged cache has of them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path
    """Folder of the caches and runs."""
    demo: Path = Path("demo-out")
    llm: Path = MODELS / "llm"
    only: Literal["all", "thresholds", "others"] = "all"
    picture: Path | None = None
    """PNG of the losses of a run for each verdict."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    expected: str
    cache: str = "as it is"
    flags: tuple[object, ...] = ()


def shuffled_words(random: np.random.Generator, captions: list[str], features: Any) -> Any:
    return [captions[k] for k in random.permutation(len(captions))], features


def noise(random: np.random.Generator, captions: list[str], features: Any) -> Any:
    return captions, random.normal(0, features[:64].astype("f4").std(), features.shape).astype("<f2")


def constant(random: np.random.Generator, captions: list[str], features: Any) -> Any:
    return captions, np.broadcast_to(features[:1], features.shape)


def zero(every: int) -> Rewrite:
    """Features of one row in `every` are zero."""

    def rewritten(random: np.random.Generator, captions: list[str], features: Any) -> Any:
        features = features.copy()
        features[random.permutation(len(features))[::every]] = 0
        return captions, features

    return rewritten


def one_caption(random: np.random.Generator, captions: list[str], features: Any) -> Any:
    return [ONE] * len(captions), features


def faint(random: np.random.Generator, captions: list[str], features: Any) -> Any:
    """Pictures differ by 3 % of what they did."""
    whole = features.astype("f4")
    mean = whole.mean(0)
    return captions, (mean + 0.03 * (whole - mean)).astype("<f2")


CACHES: dict[str, Rewrite] = {
    "shuffled words": shuffled_words,
    "noise": noise,
    "half zero": zero(2),
    "fifth zero": zero(5),
    "constant": constant,
    "one caption": one_caption,
    "faint": faint,
}
SHOWN = (
    "course",
    "shuffled words",
    "half zero, course",
    "course, rate x 1,000",
    "48 pictures, course",
    "course, 24 steps",
)
"""Runs in the picture."""
CURVES = (
    ("loss", "-C7", "training loss"),
    ("eval_loss", "o-C0", "held-out loss"),
    ("eval_grounding_gap", "s--C1", "grounding gap"),
)
MLP = ("--projector", "mlp")
PERCEIVER = ("--projector", "perceiver16x1", "--visual-tokens", "patches")
FAST, COURSE = ("--recipe", "fast", "--epochs", 999), ("--recipe", "course", "--epochs", 999)
BASE = (*("--visual-tokens", "pool", "--log-every", 5, "--eval-captions", 1), *("--save-every", 100_000))


def steps(n: int, *more: object) -> tuple[object, ...]:
    return ("--max-steps", n, "--eval-every", max(1, n // 4), *more)


THRESHOLDS = (
    Case("fast", "healthy", flags=(*FAST, *steps(160))),
    Case("fast, seed 1", "healthy", flags=(*FAST, *steps(160), "--seed", 1)),
    Case("fast, 240 steps", "healthy", flags=(*FAST, *steps(240))),
    Case("course", "healthy", flags=(*COURSE, *steps(320))),
    Case("default", "healthy", flags=(*steps(400), "--epochs", 999)),
    Case("fast, mlp", "healthy", flags=(*FAST, *steps(160), *MLP)),
    Case("fast, center", "healthy", flags=(*FAST, *steps(160), "--feature-norm", "center")),
    Case("fast, lowrank64", "healthy", flags=(*FAST, *steps(160), "--projector", "lowrank64")),
    Case("fast, 1,200 rows", "healthy", flags=(*FAST, *steps(150), "--max-samples", 1200)),
    Case("shuffled words", "blind", "shuffled words", (*FAST, *steps(160))),
    Case("shuffled words, course", "blind", "shuffled words", (*COURSE, *steps(160))),
    Case("shuffled words, mlp", "blind", "shuffled words", (*FAST, *steps(160), *MLP)),
    Case("shuffled words, seed 1", "blind", "shuffled words", (*FAST, *steps(120), "--seed", 1)),
    Case("shuffled words, 80 steps", "blind", "shuffled words", (*FAST, *steps(80))),
    Case("noise", "blind", "noise", (*FAST, *steps(160))),
    Case("noise, course", "blind", "noise", (*COURSE, *steps(160))),
    Case("half zero", "broken data", "half zero", (*FAST, *steps(80))),
    Case("half zero, course", "broken data", "half zero", (*COURSE, *steps(80))),
    Case("fifth zero", "broken data", "fifth zero", (*FAST, *steps(80))),
    Case("constant", "broken data", "constant", (*FAST, *steps(80))),
    Case("one caption", "broken data", "one caption", (*FAST, *steps(80))),
    Case("no end", "broken data", flags=(*FAST, *steps(80), "--max-text-tokens", 12)),
    Case("faint, course", "parroting", "faint", (*COURSE, *steps(80))),
    Case("faint, default", "parroting", "faint", (*steps(80), "--epochs", 999)),
    Case("course, rate x 10,000", "diverging", flags=(*COURSE, *steps(80), "--lr", 20)),
    Case("course, rate x 1,000", "diverging", flags=(*COURSE, *steps(80), "--lr", 2)),
    Case("fast, rate x 1,000", "diverging", flags=(*FAST, *steps(80), "--lr", 50)),
    Case("course, rate x 100", "diverging", flags=(*COURSE, *steps(80), "--lr", 0.2)),
    Case("mlp, rate x 1,000", "diverging", flags=(*COURSE, *steps(80), "--lr", 2, *MLP)),
    Case("48 pictures", "overfitting", flags=(*FAST, *steps(160), "--max-samples", 48)),
    Case(
        "48 pictures, mlp",
        "overfitting",
        flags=(*FAST, *steps(160), "--max-samples", 48, *MLP),
    ),
    Case("48 pictures, course", "overfitting", flags=(*COURSE, *steps(240), "--max-samples", 48)),
    Case("96 pictures", "overfitting", flags=(*FAST, *steps(200), "--max-samples", 96)),
    Case("48 pictures, default", "overfitting", flags=(*steps(240), "--epochs", 999, "--max-samples", 48)),
    Case("fast, 10 steps", "underfitting", flags=(*FAST, *steps(10))),
    Case("course, 24 steps", "underfitting", flags=(*COURSE, *steps(24))),
    Case("fast, rate / 100", "underfitting", flags=(*FAST, *steps(120), "--lr", 5e-4)),
    Case("course, rate / 100", "underfitting", flags=(*COURSE, *steps(120), "--lr", 2e-5)),
    Case("default, rate / 100", "underfitting", flags=(*steps(120), "--lr", 2e-5)),
    Case("course, rate / 1000", "underfitting", flags=(*COURSE, *steps(80), "--lr", 2e-6)),
)
# fmt: off
OTHERS = (
    Case("fast, seed 7", "healthy", flags=(*FAST, *steps(180), "--seed", 7)),
    Case("fast, batch 8", "healthy", flags=(*FAST, *steps(280), "--batch-size", 8)),
    Case("course, mlp", "healthy", flags=(*COURSE, *steps(400), *MLP)),
    Case("fast, perceiver16", "healthy", flags=(*FAST, *steps(200), *PERCEIVER)),
    Case("default, seed 5", "healthy", flags=(*steps(440), "--epochs", 999, "--seed", 5)),
    Case("fast, all tokens", "healthy", flags=(*FAST, *steps(140), "--visual-tokens", "all")),
    Case("shuffled words, seed 7", "blind", "shuffled words", (*FAST, *steps(140), "--seed", 7)),
    Case("shuffled words, default", "blind", "shuffled words", steps(160)),
    Case("shuffled words, lr 0.02", "blind", "shuffled words", (*FAST, *steps(140), "--lr", 0.02)),
    Case("noise, mlp", "blind", "noise", (*FAST, *steps(140), *MLP)),
    Case("fifth zero, mlp", "broken data", "fifth zero", (*COURSE, *steps(60), *MLP)),
    Case("constant, default", "broken data", "constant", steps(60)),
    Case("no end, course", "broken data", flags=(*COURSE, *steps(80), "--max-text-tokens", 16)),
    Case("faint, mlp", "parroting", "faint", (*COURSE, *steps(60), *MLP)),
    Case("course, rate x 3,000", "diverging", flags=(*COURSE, *steps(60), "--lr", 6)),
    Case("fast, rate x 3,000", "diverging", flags=(*FAST, *steps(60), "--lr", 150, "--seed", 3)),
    Case("32 pictures", "overfitting", flags=(*FAST, *steps(140), "--max-samples", 32)),
    Case("64 pictures, mlp", "overfitting", flags=(*COURSE, *steps(240), "--max-samples", 64, *MLP)),
    Case("course, 16 steps", "underfitting", flags=(*COURSE, *steps(16))),
    Case("default, rate / 200", "underfitting", flags=(*steps(100), "--lr", 1e-5)),
)
# fmt: on


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    for name in CACHES:
        write_cache(settings, name)
    sets = {"thresholds": THRESHOLDS, "others": OTHERS}
    for name, cases in sets.items():
        if settings.only in ("all", name):
            told = [(case, verdict(settings, case)) for case in cases]
            right = sum(found.name == case.expected for case, found in told)
            rows = [(case.name, case.expected, found.name, found.evidence[0]) for case, found in told]
            print(table(rows, ("run", "sabotaged to be", "verdict", "evidence")))
            print(f"{name}: {right} of {len(told)} right")
    if settings.picture is not None:
        draw(settings, settings.picture)


def draw(settings: Settings, path: Path) -> None:
    """Training loss, held-out loss and grounding gap of the SHOWN runs."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    cases = {case.name: case for case in THRESHOLDS}
    for axes, name in zip(figure.subplots(2, 3).flat, SHOWN, strict=True):
        lines = read_json_lines(folder_of(settings, cases[name]) / "metrics.jsonl")
        for key, style, label in CURVES:
            drawn = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*drawn, strict=True), style, linewidth=1.4, label=label)
        axes.set_title(f"{cases[name].expected}: {name}", fontsize=9)
        axes.set_ylim(-0.2, 3.6)
        axes.grid(linewidth=0.4)
        axes.tick_params(labelsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("nats per answer token", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def folder_of(settings: Settings, case: Case) -> Path:
    return settings.out / "runs" / case.name.replace(" ", "-").replace("/", "per")


def write_cache(settings: Settings, name: str) -> None:
    for part in ("train", "held-out"):
        for shard in find_shards(settings.demo / "features" / part):
            path = settings.out / "caches" / name / part / shard.path.name
            if not path.exists():
                rewrite(shard, path, CACHES[name])


def rewrite(shard: Shard, path: Path, change: Rewrite) -> None:
    """A shard of the same rows with other words or features."""
    rows, random = shard.ok_rows(), np.random.default_rng(0)
    captions = [shard.caption(row) for row in rows]
    captions, features = change(random, captions, np.stack([shard.read(row) for row in rows]))
    all_captions = [""] * shard.rows
    for row, caption in zip(rows, captions, strict=True):
        all_captions[row] = caption
    header = ShardHeader(
        encoder=shard.encoder,
        preprocess=shard.preprocess,
        source=shard.source,
        tokens=shard.tokens,
        width=shard.width,
        captions=all_captions,
        urls=shard.urls(),
        ids=shard.ids(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path, header) as writer:
        kept = dict(zip(rows, features, strict=True))
        for row in range(shard.rows):
            status = Status.OK if row in kept else Status.NO_FILE
            digest = shard.sha256[row].tobytes()
            writer.write([RowRecord(row, status, kept.get(row), sha256=digest)])
        writer.finish()


def verdict(settings: Settings, case: Case) -> Verdict:
    """Of the run, by the rules as they are now."""
    out = folder_of(settings, case)
    cache = settings.demo / "features" if case.cache == "as it is" else settings.out / "caches" / case.cache
    data = ("--features", cache / "train", "--eval-features", cache / "held-out", "--llm", settings.llm)
    command("train", "run", *BASE, *data, *case.flags, "--out", out)
    found = verdict_of(read_json_lines(out / "metrics.jsonl"))
    assert found is not None
    return found


if __name__ == "__main__":
    main()
