"""Dialogues about scenes, in Chinese and English, with their right answers: what stage 2 trains on.

The built-in world's language model has never read such questions, or any English answer.
"""

from __future__ import annotations

import collections
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_align.demo.world.captions import COUNTS, caption
from llava_align.demo.world.notes import NO_PICTURE
from llava_align.demo.world.scene import COLOURS, ENGLISH, SHAPES, SIZES, Scene, random_scene
from llava_core.language.instructions import CHINESE
from llava_core.language.prompt_and_labels import Turn

Dialogues = dict[str, tuple[Path | None, list[Turn]]]
"""Picture, if there is one, and turns of each dialogue, by its id."""
LANGUAGES = ("zh", "en")
TRAINED_KINDS = 3
"""Kinds of question in one dialogue of the training data."""
CAPTIONED = 0.5
"""Share of Chinese dialogues that begin with a caption, so that captions are not forgotten."""
WITHOUT_PICTURE = 0.06
"""Share of dialogues without a picture, as in LLaVA's mix."""


def _count(scene: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    size = rng.choice(SIZES)
    n = sum(thing.size == size for thing in scene.things)
    if chinese:
        answer = f"图中有{COUNTS[n - 1]}个{size}的图形。" if n else f"图中没有{size}的图形。"
        return [Turn(f"图中有几个{size}的图形？", answer)]
    return [Turn(f"How many {_english(size)} shapes are there?", f"{('None', 'One', 'Two', 'Three')[n]}.")]


def _compare(scene: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    if len(scene.things) < 2:
        return []
    a, b = rng.sample(scene.things, 2)
    bigger = None if a.size == b.size else a if a.size == SIZES[0] else b
    if chinese:
        answer = f"{bigger.place}的图形。" if bigger else "一样大。"
        return [Turn(f"{a.place}和{b.place}的图形，哪个更大？", answer)]
    question = f"Which is bigger, the shape {_english(a.place)} or the one {_english(b.place)}?"
    return [Turn(question, f"The one {_english(bigger.place)}." if bigger else "Neither.")]


def _where(scene: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    named = collections.Counter((thing.colour, thing.shape) for thing in scene.things)
    thing = rng.choice(scene.things)
    if named[thing.colour, thing.shape] > 1:
        return []
    if chinese:
        name = f"{thing.colour}的{thing.shape}"
        return [Turn(f"{name}在哪里？", f"{name}在{thing.place}。")]
    question = f"Where is the {_english(thing.colour)} {_english(thing.shape)}?"
    return [Turn(question, f"{_english(thing.place).capitalize()}.")]


def _yes_no(scene: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    """Half of them ask for an object of the scene, half for one in another colour or shape."""
    there = {(thing.colour, thing.shape) for thing in scene.things}
    colour, shape = rng.choice(sorted(there))
    if rng.random() < 0.5:
        near = [(other, shape) for other in COLOURS] + [(colour, other) for other in SHAPES]
        colour, shape = rng.choice([pair for pair in near if pair not in there])
    yes = (colour, shape) in there
    if chinese:
        return [Turn(f"图中有{colour}的{shape}吗？", "有。" if yes else "没有。")]
    article = "an" if colour == "橙色" else "a"
    question = f"Is there {article} {_english(colour)} {_english(shape)}?"
    return [Turn(question, "Yes." if yes else "No.")]


def _chained(scene: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    """The second question is about the place that the first answer names."""
    colours = collections.Counter(thing.colour for thing in scene.things)
    thing = rng.choice(scene.things)
    if colours[thing.colour] > 1:
        return []
    if chinese:
        first = Turn(f"{thing.colour}的图形在哪里？", f"{thing.colour}的图形在{thing.place}。")
        return [first, Turn("那里是什么形状？", f"那里是{thing.shape}。")]
    first = Turn(f"Where is the {_english(thing.colour)} shape?", f"{_english(thing.place).capitalize()}.")
    return [first, Turn("Which shape is there?", f"A {_english(thing.shape)}.")]


def _no_picture(_: Scene, chinese: bool, rng: random.Random) -> list[Turn]:
    """A word to translate, or a question about a picture that is not there."""
    if rng.random() < 0.5:
        kind = rng.choice((_count, _where, _yes_no))
        asked = [turn.question for turn in kind(random_scene(rng), chinese, rng)]
        return [Turn(question, NO_PICTURE if chinese else "I see no picture.") for question in asked]
    word = rng.choice((*COLOURS, *SHAPES))
    if chinese:
        return [Turn(f"“{word}”用英语怎么说？", f"{_english(word).capitalize()}.")]
    return [Turn(f"How do you write {_english(word)} in Chinese?", f"{word}。")]


NO_PICTURE_KIND = "no-picture"
KINDS: dict[str, Callable[[Scene, bool, random.Random], list[Turn]]] = {
    "count": _count,
    "compare": _compare,
    "where": _where,
    "yes-no": _yes_no,
    "chained": _chained,
    NO_PICTURE_KIND: _no_picture,
}
"""Kinds of dialogue: scene, whether in Chinese, and randomness -> its turns, if the scene allows any."""
ABOUT_PICTURES = tuple(kind for kind in KINDS if kind != NO_PICTURE_KIND)


def training_dialogues(
    pictures: Sequence[Path],
    scenes: Sequence[Scene],
    rng: random.Random,
    languages: Sequence[str] = LANGUAGES,
) -> Dialogues:
    """For each picture a dialogue in each language, of several kinds; and some without a picture, by id."""
    dialogues: Dialogues = {}
    for picture, scene in zip(pictures, scenes, strict=True):
        for language in languages:
            turns: list[Turn] = []
            if language == "zh" and rng.random() < CAPTIONED:
                turns.append(Turn(rng.choice(CHINESE), caption(scene, rng)))
            for kind in rng.sample(ABOUT_PICTURES, TRAINED_KINDS):
                turns += KINDS[kind](scene, language == "zh", rng)
            if turns:
                dialogues[f"{picture.stem} {language}"] = (picture, turns)
            if rng.random() < WITHOUT_PICTURE and (turns := _no_picture(scene, language == "zh", rng)):
                dialogues[f"{picture.stem} {language} {NO_PICTURE_KIND}"] = (None, turns)
    return dialogues


def held_out_dialogues(
    pictures: Sequence[Path],
    scenes: Sequence[Scene],
    rng: random.Random,
    languages: Sequence[str] = LANGUAGES,
) -> Dialogues:
    """For each picture one dialogue of each kind in each language; ids are PICTURE LANGUAGE KIND."""
    return {
        f"{picture.stem} {language} {kind}": (None if kind == NO_PICTURE_KIND else picture, turns)
        for picture, scene in zip(pictures, scenes, strict=True)
        for language in languages
        for kind, make in KINDS.items()
        if (turns := make(scene, language == "zh", rng))
    }


def write_json(path: Path, dialogues: Dialogues) -> None:
    """Write dialogues in LLaVA's JSON format, with the names of their pictures."""
    rows = []
    for key, (picture, turns) in dialogues.items():
        texts = [text for turn in turns for text in (turn.question, turn.answer)]
        if picture is not None:
            texts[0] = f"<image>\n{texts[0]}"
        said = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        image = {} if picture is None else {"image": picture.name}
        rows.append({"id": key, **image, "conversations": said})
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def normalised(answer: str) -> str:
    """An answer without case, spaces and punctuation: what is compared."""
    return re.sub(r"[\W_]+", "", answer).lower()


def _english(word: str) -> str:
    return next(words[word] for words in ENGLISH.values() if word in words)
