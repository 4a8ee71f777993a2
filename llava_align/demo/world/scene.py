"""Scenes of the built-in world: one to three objects, each in its own cell of a 3×3 grid."""

from __future__ import annotations

import dataclasses
import random

COLOURS = ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "黑色")
SHAPES = ("圆形", "正方形", "三角形", "五角星", "十字形", "菱形")
PLACES = ("左上角", "上方", "右上角", "左侧", "中央", "右侧", "左下角", "下方", "右下角")
"""In reading order: index = 3 * row + column."""
SIZES = ("大", "小")
BACKGROUNDS = ("白色", "灰色", "米色")
MOST_OBJECTS = 3
ENGLISH = {
    "size": dict(zip(SIZES, ("big", "small"), strict=True)),
    "colour": dict(
        zip(COLOURS, ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black"), strict=True)
    ),
    "shape": dict(zip(SHAPES, ("circle", "square", "triangle", "star", "cross", "diamond"), strict=True)),
    "place": dict(
        zip(
            PLACES,
            (
                *("at the top left", "at the top", "at the top right"),
                *("on the left", "in the middle", "on the right"),
                *("at the bottom left", "at the bottom", "at the bottom right"),
            ),
            strict=True,
        )
    ),
}
"""English words of each attribute, in the order of an English sentence."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object; each attribute is a word of the lists above."""

    place: str
    size: str
    colour: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    """Objects in reading order of their places."""
    background: str


def random_scene(rng: random.Random) -> Scene:
    places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, MOST_OBJECTS)))
    things = tuple(
        Thing(PLACES[place], rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)) for place in places
    )
    return Scene(things, rng.choice(BACKGROUNDS))


def near_scene(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with one attribute of one object changed: what a contrastive encoder must tell apart."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    attribute = rng.choice(("place", "size", "colour", "shape"))
    taken = {t.place for t in scene.things}
    choices: dict[str, tuple[str, ...]] = {
        "place": tuple(p for p in PLACES if p not in taken),
        "size": tuple(s for s in SIZES if s != thing.size),
        "colour": tuple(c for c in COLOURS if c != thing.colour),
        "shape": tuple(s for s in SHAPES if s != thing.shape),
    }
    changed = dataclasses.replace(thing, **{attribute: rng.choice(choices[attribute])})
    things = [*scene.things[:index], changed, *scene.things[index + 1 :]]
    return Scene(tuple(sorted(things, key=lambda t: PLACES.index(t.place))), scene.background)
