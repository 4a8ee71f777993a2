"""Instructions that captions answer in training; the first of them is the default question afterwards."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from llava_core.errors import LlavaError

CHINESE = (
    "请描述这张图片。",
    "描述图中的内容。",
    "这张图片里有什么？",
    "请详细说明图片中的内容。",
    "用中文描述一下这幅图。",
    "你在图中看到了什么？",
)
ENGLISH = (
    "Describe the image.",
    "What is in this picture?",
    "Describe this image in detail.",
    "What do you see?",
)
INSTRUCTIONS = (*CHINESE, *ENGLISH)
"""Both languages mixed, which runs drew from before there was a choice."""
QUESTION = CHINESE[0]
"""Default question where it is not known what a projector was trained with."""
LISTS = {"zh": CHINESE, "en": ENGLISH, "mixed": INSTRUCTIONS}
"""Lists by name; `auto` takes for each caption the one in the caption's language."""
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
HAN_SHARE = 0.2
"""Least share of Han characters among the letters of a Chinese text: one is a word, of which other scripts
need several letters."""


def read_instructions(given: str) -> str:
    """What `--instructions` stands for: `auto`, a name in LISTS, or a file's lines, each ended by a newline.

    Texts that were read before are returned as they are. Raises LlavaError (wrong usage) for anything else.
    """
    if given == "auto" or given in LISTS or "\n" in given:
        return given
    try:
        lines = [line.strip() for line in Path(given).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError):
        lines = []
    if not any(lines):
        expected = f"auto, {', '.join(LISTS)}, or a UTF-8 file with an instruction a line"
        raise LlavaError("--instructions", expected=expected, got=given, exit_code=2)
    return "".join(f"{line}\n" for line in lines if line)


def is_chinese(text: str) -> bool:
    """Whether a text is Chinese by the share of Han characters among its letters; one without any is not."""
    return 0 < HAN_SHARE * sum(map(str.isalpha, text)) <= len(HAN.findall(text))


def instructions_for(given: str, caption: str) -> Sequence[str]:
    """The list that a caption's instruction is drawn from; `given` is what `read_instructions` returns."""
    if given == "auto":
        return CHINESE if is_chinese(caption) else ENGLISH
    return LISTS.get(given) or given.splitlines()


def default_question(given: str, captions: Sequence[str]) -> str:
    """The first instruction; for `auto`, in the language that most of the captions have."""
    chinese = given == "auto" and 2 * sum(map(is_chinese, captions)) >= len(captions)
    return instructions_for("zh" if chinese else given, "a")[0]


def pick_instruction(seed: int, key: str, instructions: Sequence[str] = INSTRUCTIONS) -> str:
    """One of the instructions: a pure function of these arguments, the same on every machine."""
    return instructions[zlib.crc32(f"{seed}/{key}".encode(errors="surrogateescape")) % len(instructions)]
