"""The text that the built-in world's language model was trained on: questions about notes of a scene."""

from __future__ import annotations

import random

from llava_align.demo.world.captions import COUNTS, phrase
from llava_align.demo.world.scene import PLACES, SHAPES, Scene
from llava_core.language.prompt_and_labels import Turn

NO_PICTURE = "没有看到图片。"
"""Its answer where there are neither notes nor a picture."""


def notes(scene: Scene, rng: random.Random) -> list[str]:
    """Words of a scene, object after object in random order, the place first."""
    words = []
    for thing in rng.sample(scene.things, len(scene.things)):
        words += [thing.place, *rng.sample([thing.size, thing.colour, thing.shape], 3)]
    at = rng.choice((0, len(words)))
    words[at:at] = [scene.background]
    return words


def question(scene: Scene, rng: random.Random) -> Turn:
    """One of the questions that the language model was trained on, with its answer."""
    things = scene.things
    kind = rng.choice(("count", "background", "place", "place", "colour", "where", "shape"))
    thing = rng.choice(things)
    if kind == "count":
        return Turn("图中有几个图形？", f"图中有{COUNTS[len(things) - 1]}个图形。")
    if kind == "background":
        return Turn("背景是什么颜色的？", f"背景是{scene.background}的。")
    if kind == "colour" and sum(t.shape == thing.shape for t in things) == 1:
        return Turn(f"{thing.shape}是什么颜色的？", f"{thing.shape}是{thing.colour}的。")
    if kind == "where" and sum(t.shape == thing.shape for t in things) == 1:
        return Turn(f"{thing.shape}在哪里？", f"{thing.shape}在{thing.place}。")
    if kind == "shape" and sum(t.colour == thing.colour for t in things) == 1:
        return Turn(f"{thing.colour}的图形是什么形状？", f"{thing.colour}的图形是{thing.shape}。")
    if kind == "where":
        absent = [shape for shape in SHAPES if shape not in {t.shape for t in things}]
        shape = rng.choice(absent)
        return Turn(f"{shape}在哪里？", f"图中没有{shape}。")
    place = rng.choice((thing.place, thing.place, rng.choice(PLACES)))
    there = [t for t in things if t.place == place]
    return Turn(
        f"{place}是什么？",
        phrase(there[0], "{place}是一个{size}的{colour}{shape}。") if there else f"{place}没有图形。",
    )
