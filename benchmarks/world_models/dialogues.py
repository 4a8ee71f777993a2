"""Training dialogues for the small language model, which learns to use words of its context; no pictures.

The context takes the place that visual tokens will have. It is a sequence of slots, each a weighted set of
words, such as 左上角+红色, whose embedding is the sum of theirs. Plain notes (one word a slot) occur as well,
and dialogues without any context.
"""

from __future__ import annotations

import dataclasses
import random

from llava_align.demo.world.captions import caption
from llava_align.demo.world.notes import NO_PICTURE, notes, question
from llava_align.demo.world.scene import PLACES, Scene, Thing, random_scene
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.prompt_and_labels import Turn

Slot = list[tuple[str, float]]
"""Words and their weights."""

MOST_SLOTS = 40


@dataclasses.dataclass(frozen=True)
class Dialogue:
    slots: list[Slot]
    turns: list[Turn]


def random_dialogue(rng: random.Random) -> Dialogue:
    """A random context, and one to three questions about it with their answers."""
    scene = random_scene(rng)
    if rng.random() < 0.03:
        return Dialogue([], [Turn(rng.choice(INSTRUCTIONS), NO_PICTURE)])
    plain = rng.random() < 0.2
    slots = [[(word, 1.0)] for word in notes(scene, rng)] if plain else mixed_notes(scene, rng)
    if rng.random() < 0.7:
        turns = [Turn(rng.choice(INSTRUCTIONS), caption(scene, rng))]
    else:
        turns = [question(scene, rng)]
    turns += [question(scene, rng) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    return Dialogue(slots, turns)


def mixed_notes(scene: Scene, rng: random.Random) -> list[Slot]:
    """Several slots per object, with its place and some words; other slots hold place and background."""
    placed: list[tuple[int, Slot]] = []
    for thing in scene.things:
        placed += [(PLACES.index(thing.place), slot) for slot in _about(thing, rng)]
    empty = [place for place in PLACES if place not in {thing.place for thing in scene.things}]
    for _ in range(rng.randint(1, MOST_SLOTS - 1 - len(placed))):
        place = rng.choice(empty)
        slot: Slot = [(place, rng.uniform(0.3, 1.2))] if rng.random() < 0.8 else []
        if rng.random() < 0.7:
            slot.append((scene.background, rng.uniform(0.3, 1.2)))
        placed.append((PLACES.index(place), slot))
    if rng.random() < 0.5:
        rng.shuffle(placed)
    else:
        placed.sort(key=lambda pair: pair[0])
    return [[(scene.background, 1.0)]] + [slot for _, slot in placed]


def _about(thing: Thing, rng: random.Random) -> list[Slot]:
    words = [thing.size, thing.colour, thing.shape]
    sets = [[word for word in words if rng.random() < 0.7] for _ in range(rng.randint(1, 6))]
    missing = [word for word in words if not any(word in chosen for chosen in sets)]
    sets[0] = sets[0] + missing
    return [[(w, rng.uniform(0.4, 1.3)) for w in [thing.place, *chosen]] for chosen in sets]
