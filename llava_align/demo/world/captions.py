"""Rule-based captions of scenes, parsing them back, and the attribute accuracy of answers."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence

from llava_align.demo.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from llava_core.shuffled_pairs import mismatched_rows

COUNTS = ("一", "两", "三")
ATTRIBUTES = ("shape", "colour", "place", "size")
"""Attributes of an object that the demo's accuracy counts."""

_OPENINGS = (
    "图中有{n}个图形",
    "这张图片里有{n}个物体",
    "画面上可以看到{n}个图形",
    "这是一幅简单的图画，共有{n}个图形",
)
_BACKGROUND = ("，背景是{b}的。", "，放在{b}的背景上。", "。背景为{b}。")
_THING = (
    "{place}有一个{size}的{colour}{shape}",
    "{place}是一个{size}的{colour}{shape}",
    "{place}画着一个{size}的{colour}{shape}",
)
_SHORT_THING = (
    "{place}有{size}的{colour}{shape}",
    "{place}一个{size}{colour}{shape}",
    "{size}{colour}{shape}在{place}",
)


def caption(scene: Scene, rng: random.Random) -> str:
    """A dense caption; opening and wording vary, objects come in reading order."""
    opening = rng.choice(_OPENINGS).format(n=COUNTS[len(scene.things) - 1])
    background = rng.choice(_BACKGROUND).format(b=scene.background)
    wording = rng.choice(_THING)
    return opening + background + "，".join(phrase(thing, wording) for thing in scene.things) + "。"


def short_caption(scene: Scene, rng: random.Random) -> str:
    """The content of `caption` within Chinese-CLIP's 52 tokens; objects in random order."""
    things = rng.sample(scene.things, len(scene.things))
    parts = [f"{scene.background}背景", *(phrase(thing, rng.choice(_SHORT_THING)) for thing in things)]
    return "，".join(parts)


def phrase(thing: Thing, wording: str = _THING[0]) -> str:
    return wording.format(**dataclasses.asdict(thing))


def parse(text: str) -> list[Thing]:
    """The objects that a caption names; clauses that lack an attribute are skipped."""
    return [Thing(*found) for found in _CLAUSE.findall(text)]


def parse_background(text: str) -> str:
    """The background that a caption names first, or else the first of BACKGROUNDS."""
    return min(BACKGROUNDS, key=lambda word: text.find(word) % (len(text) + 1))


def _any(words: Iterable[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_CLAUSE = re.compile(f"{_any(PLACES)}[^，。]*?{_any(SIZES)}的?{_any(COLOURS)}的?{_any(SHAPES)}")


Parse = Callable[[str], list[Thing]]
"""How a language's captions are read: `parse`, or that of benchmarks.english_world."""


def score(scene: Scene, text: str, parse: Parse = parse) -> dict[str, tuple[int, int]]:
    """Attributes of the scene's objects that the text names correctly: attribute -> (correct, total).

    Named objects and objects of the scene are matched one to one so that most attributes agree. All
    attributes of omitted and of invented objects count as wrong, so that naming more does not help.
    """
    there, named = list(scene.things), parse(text)
    longer, shorter = (named, there) if len(named) > len(there) else (there, named)
    best: list[tuple[Thing, Thing]] = []
    most = -1
    for chosen in itertools.permutations(longer[:6], len(shorter)):
        pairs = list(zip(chosen, shorter, strict=True))
        agree = sum(getattr(a, name) == getattr(b, name) for a, b in pairs for name in ATTRIBUTES)
        if agree > most:
            best, most = pairs, agree
    return {
        name: (sum(getattr(a, name) == getattr(b, name) for a, b in best), len(longer)) for name in ATTRIBUTES
    }


def accuracy(scenes: Sequence[Scene], texts: Sequence[str], parse: Parse = parse) -> dict[str, float]:
    """Share of attributes named correctly, for each attribute and as `all`, over pictures and their texts."""
    totals = {name: [0, 0] for name in ATTRIBUTES}
    for scene, text in zip(scenes, texts, strict=True):
        for name, (right, asked) in score(scene, text, parse).items():
            totals[name][0] += right
            totals[name][1] += asked
    shares = {name: right / asked for name, (right, asked) in totals.items()}
    return {**shares, "all": sum(r for r, _ in totals.values()) / sum(a for _, a in totals.values())}


def chance(scenes: Sequence[Scene], rng: random.Random) -> dict[str, float]:
    """Accuracy of true captions of other pictures: each scene with another one's caption."""
    return accuracy(scenes, shuffled(scenes, [caption(scene, rng) for scene in scenes]))


def shuffled(scenes: Sequence[Scene], texts: Sequence[str]) -> list[str]:
    """For each scene, the text of another scene's picture. Raises ValueError if all scenes are equal."""
    others = mismatched_rows(scenes)
    if others is None:
        raise ValueError(f"{len(scenes)} pictures of one scene")
    return [texts[other] for other in others]
