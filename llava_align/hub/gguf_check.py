"""Greedy answers of llama.cpp beside those of `infer`, about the same pictures, after an export to GGUF."""

from __future__ import annotations

import importlib.metadata
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from infer.answerer import ImageAnswerer
from infer.chat.image_dialogue import ImageDialogue
from llava_align.demo.world.render import render
from llava_align.demo.world.scene import random_scene
from llava_align.hub.gguf_mmproj import sent_tokens
from llava_align.hub.llama_cpp import llama_cpp, png
from llava_core.cli.console import progress, say
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict
from llava_core.vision.image_files import images_below, read_image
from llava_core.vision.image_formats import ImageError
from llava_core.vision.tower import VisionTower

MAX_TOKENS = 64
"""Longest answer that is compared."""
MOST_CONTEXT = 4096
SHAPES = ((192, 192), (256, 144), (144, 256), (400, 300), (96, 96), (640, 240), (300, 400), (150, 200))
"""Width and height of drawn pictures, in turn."""


def pictures(folder: Path | None, count: int) -> list[bytes]:
    """The first `count` image files below a folder; without one, drawn pictures, the same at each call."""
    if folder is not None:
        return [read_image(str(path)) for path in images_below(folder)[:count]]
    rng = random.Random(0)
    drawn = [render(random_scene(rng), rng).resize(SHAPES[k % len(SHAPES)]) for k in range(count)]
    return [png(np.asarray(image)) for image in drawn]


@torch.inference_mode()
def compare(folder: Path, aligned: ImageAnswerer, images: Sequence[bytes]) -> JsonDict:
    """Print and return how many of llama.cpp's answers are those of `infer`, word for word.

    Each picture is asked about as it is, and as the square that the encoder takes: how llama.cpp prepares a
    picture is one question, what it computes from it another.
    """
    assert isinstance(aligned.tower, VisionTower)
    sent, question = sent_tokens(aligned.tower, aligned.projector), aligned.question
    dialogue = ImageDialogue(aligned, Sampling(max_tokens=MAX_TOKENS))

    def ours(visual: torch.Tensor) -> str:
        dialogue.begin(visual)
        return "".join(dialogue.ask(question)).strip()

    asked = as_they_are = as_squares = same_tokens = 0
    read = len(aligned.conversation.prompt([{"role": "user", "content": question}]))
    context = min(aligned.llm.context, MOST_CONTEXT)
    with llama_cpp(folder, context) as ask, progress(len(images), "pictures") as bar:
        for image in images:
            bar.update()
            try:
                decoded = aligned.decode(image)
            except ImageError as error:
                say(f"an image is left out of the comparison: {error}")
                continue
            features = aligned.tower.encode_images([decoded]).half().float()
            visual = aligned.project(features)
            expected, square = ours(visual), ask(png(decoded.pixels), question, MAX_TOKENS)
            asked += 1
            as_they_are += ask(image, question, MAX_TOKENS).text == expected
            as_squares += square.text == expected
            tokens, told = visual.shape[1], expected
            if sent is not None:
                theirs = torch.cat([features[:, sent], features[:, :1]], 1)
                tokens, told = theirs.shape[1], ours(aligned.projector.map(theirs).to(visual))
                same_tokens += square.text == told
            if (got := square.prompt_tokens) != tokens + read and asked == 1:
                say(f"llama.cpp reads the question as {got - tokens} tokens, infer as {read}")
    if not asked:
        raise LlavaError(
            "nothing was compared", got="no image that can be read", do="give --check-images others"
        )
    version = importlib.metadata.version("xllamacpp")
    say(
        f"llama.cpp (xllamacpp {version}) answers as infer does, word for word: {as_they_are} of {asked} "
        f"pictures as they are, {as_squares} as the squares that the encoder takes"
    )
    if sent is not None:
        say(
            f"with the visual tokens that llama.cpp sends, infer answers as it does: {same_tokens} of {asked}"
        )
    return {
        "xllamacpp": version,
        "pictures": asked,
        "same_as_they_are": as_they_are,
        "same_as_squares": as_squares,
        **({} if sent is None else {"same_given_its_tokens": same_tokens}),
    }
