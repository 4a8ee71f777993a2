"""Why a row is left out of a row list: the first of these that applies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from extract.curate.config import Language
from llava_core.cli.console import width
from llava_core.language.instructions import is_chinese

Reason = Literal[
    "", "blank features", "no caption", "short caption", "other language", "repeated caption",
    "words in no order", "caption of another picture", "near-duplicate",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)
"""All reasons; the first stands for a row that is kept."""
LANGUAGE_SHARE = 0.6
"""Share of the captions from which their language is that of the cache (`auto`)."""


def caption_reasons(
    captions: Sequence[str], language: Language, least_width: int, most_repeats: int
) -> tuple[list[Reason], Language]:
    """A reason for each caption that lies in its text alone, and the language that is kept: zh, other or any.

    `least_width` is in columns, of which a Chinese character takes two; a caption on more than `most_repeats`
    rows is repeated on all of them.
    """
    chinese = np.array([is_chinese(caption) for caption in captions], bool)
    worded = np.array([bool(caption) for caption in captions], bool)
    if language == "auto":
        share = float(chinese[worded].mean()) if worded.any() else 1.0
        language = "zh" if share >= LANGUAGE_SHARE else "other" if share <= 1 - LANGUAGE_SHARE else "any"
    counts = Counter(captions)

    def reason(caption: str, is_chinese: bool) -> Reason:
        if not caption:
            return "no caption"
        if width(caption) < least_width:
            return "short caption"
        if language != "any" and is_chinese != (language == "zh"):
            return "other language"
        return "repeated caption" if counts[caption] > most_repeats else ""

    return [reason(*each) for each in zip(captions, chinese.tolist(), strict=True)], language
