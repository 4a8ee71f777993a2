"""`infer ask`: one question about an image, or the same about each of several."""

from __future__ import annotations

import dataclasses
import sys

from infer.answerer import open_image_answerer
from infer.chat.image_dialogue import ImageDialogue
from infer.config import AskConfig
from llava_core.cli.console import say, show
from llava_core.errors import LlavaError
from llava_core.language.sampling import sampling_of
from llava_core.types import JsonDict


def run(config: AskConfig) -> JsonDict:
    """Print the answer, or for several images `IMAGE: ANSWER` each; images that fail are skipped.

    Raises LlavaError if the only image fails.
    """
    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if prompt is not None and prompt != prompt.encode(errors="replace").decode():
        raise LlavaError("--prompt", expected="text in UTF-8", got=ascii(prompt), exit_code=2)
    dialogue = ImageDialogue(open_image_answerer(config), sampling_of(config))
    prompt = dialogue.aligned.question if prompt is None else prompt
    if len(config.image) == 1:
        return {"image": config.image[0], "prompt": prompt, **ask(dialogue, config.image[0], prompt)}
    answers: list[JsonDict] = []
    for image in config.image:
        try:
            answers.append({"image": image, **ask(dialogue, image, prompt, before=f"{image}: ")})
        except LlavaError as error:
            say(error)
            answers.append({"image": image, "error": str(error)})
    return {"prompt": prompt, "answers": answers, "exit_code": int(any("error" in line for line in answers))}


def ask(dialogue: ImageDialogue, image: str, prompt: str, before: str = "") -> JsonDict:
    """Print the answer as it is generated, after `before`; returns it with its tokens and seconds."""
    if image == "-":
        dialogue.show_file("standard input", sys.stdin.buffer.read())
    else:
        dialogue.show(image)
    show(before, end="")
    pieces = []
    for piece in dialogue.ask(prompt):
        show(piece, end="")
        pieces.append(piece)
    show()
    figures = {**dataclasses.asdict(dialogue.figures), "tokens_per_s": dialogue.figures.tokens_per_s}
    return {"answer": "".join(pieces).strip(), **figures}
