"""`infer chat`: a dialogue about images at the terminal, or over a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from infer.answerer import open_image_answerer
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.messages import pick_language
from infer.chat.repl import ChatRepl, unquoted
from infer.chat.transcript import Transcript
from infer.config import ChatConfig
from llava_core.cli.console import say
from llava_core.cli.terminal import PREVIEW_COLUMNS
from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.sampling import sampling_of
from llava_core.types import JsonDict
from llava_core.vision.image_files import SUFFIXES, is_url


def run(config: ChatConfig) -> JsonDict:
    aligned, compiled = open_image_answerer(config), None
    if config.compile:
        say("compiling the step for one token")
        compiled = CompiledStep(aligned.llm)
        compiled.warm_up()
    dialogue = ImageDialogue(
        aligned, sampling_of(config), compiled=compiled, allow_private=config.allow_private
    )
    repl = ImageChatRepl(dialogue, pick_language(config.lang))
    if config.image:
        repl.image(config.image)
    else:
        repl.say("welcome image")
    return repl.run()


class ImageChatRepl(ChatRepl):
    """A chat about images: /image, and a line that is an image shows it."""

    dialogue: ImageDialogue

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        return {"/image": self.image, **super().make_commands()}

    def evaluate(self, line: str) -> None:
        if image := bare_image(line):
            self.image(image)
        else:
            super().evaluate(line)

    def image(self, rest: str) -> None:
        """Begin a dialogue about an image. Raises LlavaError, and keeps the old one, if that fails."""
        if not rest:
            raise LlavaError("/image needs an image", do="write /image PATH or /image URL")
        image = unquoted(rest)
        self.dialogue.show(image)
        self._preview()
        self.say("shown", image=image)

    def resume(self, transcript: Transcript) -> None:
        super().resume(transcript)
        self._preview()

    def _preview(self) -> None:
        if decoded := self.dialogue.decoded:
            preprocess = self.dialogue.aligned.tower.preprocess
            self.terminal.picture(preprocess.preview(decoded, side=PREVIEW_COLUMNS))


def bare_image(line: str) -> str | None:
    """The image, if the whole line is a URL or the path of an image file, quoted or not."""
    if is_url(line):
        return line if len(line.split()) == 1 else None
    path = os.path.expanduser(unquoted(line))
    return path if Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path) else None
