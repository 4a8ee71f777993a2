"""Benchmarks in the layouts of VLMEvalKit and lmms-eval, and one about the built-in world."""

from __future__ import annotations

import base64
import csv
import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llava_align.config import DemoConfig
from llava_align.demo.world.captions import caption
from llava_align.demo.world.dataset import split_scenes
from llava_align.demo.world.dialogues import KINDS
from llava_align.demo.world.scene import COLOURS, SHAPES, Scene
from llava_core.language.instructions import QUESTION

CHOICES = 4


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """VLMEvalKit's layout: a header, tabs, images in base64; bytes are written so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: in_base64(value) for name, value in row.items()})
    return path


def in_base64(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def caption_choices(scene: Scene, category: str, rng: random.Random) -> tuple[list[str], int]:
    """Captions of a scene that differ in the colour or shape of one object, and which one is right."""
    words, attribute = {"colour": (COLOURS, "colour"), "shape": (SHAPES, "shape")}[category]
    place = rng.randrange(len(scene.things))
    right = getattr(scene.things[place], attribute)
    options = rng.sample([word for word in words if word != right], CHOICES - 1) + [right]
    rng.shuffle(options)
    wording = rng.random()
    texts = []
    for word in options:
        thing = dataclasses.replace(scene.things[place], **{attribute: word})
        things = (*scene.things[:place], thing, *scene.things[place + 1 :])
        texts.append(caption(Scene(things, scene.background), random.Random(wording)))
    return texts, options.index(right)


def write_demo_task(demo: Path, path: Path) -> Path:
    """Which of four captions has the right colour, or shape, of a held-out picture of a finished demo?"""
    rng, rows = random.Random(0), list[Mapping[str, object]]()
    scenes = split_scenes("held-out", DemoConfig.held_out, DemoConfig.seed)
    pictures = sorted((demo / "pictures/held-out").glob("*.jpg"))
    for picture, scene in zip(pictures, scenes, strict=True):
        for category in ("colour", "shape"):
            texts, right = caption_choices(scene, category, rng)
            options = dict(zip("ABCD", texts, strict=True))
            known = {"index": len(rows), "image": picture.read_bytes(), "question": QUESTION}
            rows.append({**known, **options, "answer": "ABCD"[right], "category": category})
    return write_tsv(path, rows)


def write_demo_questions(demo: Path, path: Path, kind: str, chinese: bool) -> Path:
    """lmms-eval's layout: one question of this kind about each held-out picture, for the demo's stage 2."""
    rng, rows = random.Random(0), list[dict[str, object]]()
    scenes = split_scenes("held-out", DemoConfig.held_out, DemoConfig.seed)
    pictures = sorted((demo / "pictures/held-out").glob("*.jpg"))
    for number, (picture, scene) in enumerate(zip(pictures, scenes, strict=True)):
        image = {"bytes": picture.read_bytes(), "path": picture.name}
        for turn in KINDS[kind](scene, chinese, rng):
            answer = turn.answer.rstrip(".").lower()
            known = {"question_id": str(number), "image": image, "category": scene.background}
            rows.append({**known, "question": turn.question, "answer": answer})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


if __name__ == "__main__":  # python -m tests.support.benchmark_tasks demo-out FOLDER
    given, folder = map(Path, sys.argv[1:])
    write_demo_task(given, folder / "colours.tsv")
    write_demo_questions(given, folder / "objects.parquet", "yes-no", chinese=False)
    write_demo_questions(given, folder / "places.parquet", "where", chinese=True)
