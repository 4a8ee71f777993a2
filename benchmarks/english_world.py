"""English captions of the built-in world, one short sentence each, and their parser; for published models.

The background is left out, since tokens of a real model take time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from llava_align.demo.world.scene import ENGLISH, Scene, Thing

QUESTION = "Describe the picture."


def caption(scene: Scene) -> str:
    """Caption such as "A big red circle on the left, a small blue star in the middle.", in reading order."""
    return ", ".join(map(phrase, scene.things)).capitalize() + "."


def phrase(thing: Thing) -> str:
    return " ".join(("a", *(words[getattr(thing, name)] for name, words in ENGLISH.items())))


def parse(text: str) -> list[Thing]:
    """The objects that a caption names; clauses that lack an attribute are skipped."""
    return [
        Thing(**{name: _OURS[name][word] for name, word in found.groupdict().items()})
        for found in _CLAUSE.finditer(text)
    ]


def write_json(path: Path, pictures: Sequence[Path], scenes: Sequence[Scene]) -> None:
    """Write pictures and captions in LLaVA's JSON format, each caption as the answer to QUESTION.

    `path` must be in a folder above the pictures.
    """
    rows = [
        {
            "id": picture.stem,
            "image": str(picture.relative_to(path.parent)),
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": caption(scene)},
            ],
        }
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


_OURS = {name: {english: ours for ours, english in words.items()} for name, words in ENGLISH.items()}


def _any(name: str) -> str:
    return f"(?P<{name}>" + "|".join(sorted(_OURS[name], key=len, reverse=True)) + ")"


_CLAUSE = re.compile(" ".join(map(_any, ENGLISH)) + r"\b")
