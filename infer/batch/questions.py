"""Questions of `infer batch`: lines of a JSONL file about images, or rows of feature shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from infer.answerer import (
    FeatureAnswerer,
    ImageAnswerer,
    open_asked_shards,
    open_feature_answerer,
    open_image_answerer,
)
from infer.batch.jsonl import read_lines
from infer.config import QuestionFile
from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.network.fetch_limits import FetchLimits
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.row_status import Status
from llava_core.shards.other_words import with_words
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict
from llava_core.vision.image_files import not_an_image, read_images, untrusted_limits
from llava_core.vision.image_formats import ImageError

OUTPUT_KEYS = ("answer", "error", "checkpoint", "adapter", "sampling")
"""Keys that the output of `infer batch` adds to a line."""

VisualTokenLoader = Callable[[Sequence[JsonDict]], list[torch.Tensor | LlavaError]]
"""Questions -> the visual tokens [T, hidden] of each, or why there are none."""


def open_questions(
    config: QuestionFile, output_keys: Sequence[str], read_keys: Sequence[str] = ("image", "system", "prompt")
) -> tuple[list[JsonDict], Callable[[], tuple[FeatureAnswerer, VisualTokenLoader]]]:
    """The questions, and what loads the models and the questions' visual tokens.

    Of a line, only `read_keys` have an effect; others are named.
    """
    prompt = config.prompt
    if prompt is None:
        prompt = load_checkpoint(config.checkpoint).provenance.question
    if config.features is not None:
        shards = open_asked_shards(config)
        asked = shards if config.text is None else with_words(shards, config.text)

        def open_stored() -> tuple[FeatureAnswerer, VisualTokenLoader]:
            answerer = open_feature_answerer(config, shards[0])
            return answerer, load_from_shards(answerer, shards)

        return questions_of(asked, prompt), open_stored
    assert config.input is not None
    folder = config.input.parent
    questions = read_questions(config.input, prompt, output_keys)

    def open_live() -> tuple[FeatureAnswerer, VisualTokenLoader]:
        if copied := sorted({key for question in questions for key in question} - {*read_keys}):
            asked = sum(question["prompt"] == prompt for question in questions)
            effective = f"of a line, {', '.join(read_keys)} have an effect"
            asking = f"{asked} of {len(questions)} lines ask {prompt!r}"
            say(f"only copied to {config.output}: {', '.join(copied)} ({effective}); {asking}")
        aligned = open_image_answerer(config)
        limits = untrusted_limits(config.allow_private, config.headers())
        return aligned, load_from_images(aligned, folder, limits)

    return questions, open_live


def read_questions(path: Path, prompt: str, output_keys: Sequence[str]) -> list[JsonDict]:
    """Questions of a JSONL file. Raises LlavaError for an invalid line, or a key that the output adds."""
    questions = [{"prompt": prompt, **line} for line in read_lines(path)]
    for number, question in enumerate(questions, 1):
        told = {"image": None, "system": "", **question}
        if not all(isinstance(told[key], str) for key in ("image", "system", "prompt")):
            wanted = '{"image": PATH or URL, "prompt": TEXT}'
            got = ", ".join(question)
            raise LlavaError(f"line {number} of {path} is no question", expected=wanted, got=f"keys {got}")
        if taken := [key for key in output_keys if key in question]:
            do = f"rename it, since the output has {', '.join(output_keys)} of its own"
            raise LlavaError(f"line {number} of {path} has the key {taken[0]!r}", do=do)
    return questions


def questions_of(shards: Sequence[Shard], prompt: str) -> list[JsonDict]:
    """One question for each row with features, or about no picture; a dialogue gives its system message,
    its first question and its first answer. Prints how many have more questions."""
    questions, more = [], 0
    for shard in shards:
        for row in np.flatnonzero(np.isin(shard.status, (Status.OK, Status.TEXT_ONLY))).tolist():
            dialogue = shard.dialogue(row)
            asked, caption = next(iter(dialogue.turns), (None, ""))
            more += sum(question is not None for question, _ in dialogue.turns) > 1
            words = {"system": dialogue.system, "prompt": asked or prompt, "caption": caption}
            known = {"id": shard.id(row), **words}
            texts = {key: text for key, text in known.items() if text}
            questions.append({"shard": shard.path.name, "row": shard.picture_row(row), **texts})
    if more:
        say(f"{counted(more, 'dialogue')} of several questions: the first alone is asked")
    return questions


def load_from_images(aligned: ImageAnswerer, folder: Path, limits: FetchLimits) -> VisualTokenLoader:
    """Visual tokens of images in data URLs, at URLs, or at paths relative to `folder`."""

    def load(questions: Sequence[JsonDict]) -> list[torch.Tensor | LlavaError]:
        decoded, errors = [], list[LlavaError | None]()
        images = [question["image"] for question in questions]
        for image, file in zip(images, read_images(images, limits, folder), strict=True):
            error = file if isinstance(file, LlavaError) else None
            if not isinstance(file, LlavaError):
                try:
                    decoded.append(aligned.decode(file))
                except ImageError as undecoded:
                    error = not_an_image(image, undecoded)
            errors.append(error)
        visual = iter(aligned.encode_images(decoded) if decoded else ())
        return [next(visual) if error is None else error for error in errors]

    return load


def load_from_shards(answerer: FeatureAnswerer, shards: Sequence[Shard]) -> VisualTokenLoader:
    """Visual tokens of rows of shards, none of a row about no picture; a damaged row gives its error."""
    by_name = {shard.path.name: shard for shard in shards}

    def load(questions: Sequence[JsonDict]) -> list[torch.Tensor | LlavaError]:
        visual: list[torch.Tensor | LlavaError] = []
        for question in questions:
            shard, row = by_name[question["shard"]], question["row"]
            try:
                if shard.status[row] == Status.TEXT_ONLY:
                    visual.append(answerer.embed(())[0])
                else:
                    visual.append(answerer.project(torch.from_numpy(shard.read(row))[None])[0])
            except LlavaError as damaged:
                visual.append(damaged)
        return visual

    return load
