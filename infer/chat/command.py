"""`infer chat`: a dialogue about images at the terminal, or over a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from infer.aligned_model import open_aligned_model
from infer.chat.image_dialogue import ImageDialogue
from infer.chat.messages import Messages, pick_language
from infer.chat.repl import Chat, unquoted
from infer.chat.transcript import Transcript
from infer.config import ChatConfig
from llava_core.cli.console import say
from llava_core.cli.terminal import PREVIEW_COLUMNS
from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.sampling import sampling_of
from llava_core.types import JsonDict
from llava_core.vision.image_files import SUFFIXES, is_url
from llava_core.vision.preprocess import Decoded


def run(config: ChatConfig) -> JsonDict:
    dialogue = ImageDialogue(open_aligned_model(config), sampling_of(config))
    dialogue.allow_private = config.allow_private
    if config.compile:
        say("compiling the step for one token")
        dialogue.compiled = CompiledStep(dialogue.llm)
        dialogue.compiled.warm_up()
    chat = ImageChat(dialogue, Messages(pick_language(config.lang)))
    if config.image:
        chat.image(config.image)
    else:
        chat.say("welcome image")
    return chat.run()


class ImageChat(Chat):
    """A chat about images."""

    dialogue: ImageDialogue

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        return {"/image": self.image, **super().make_commands()}

    def obey(self, line: str) -> None:
        if image := bare_image(line):
            self.image(image)
        else:
            super().obey(line)

    def image(self, rest: str) -> None:
        """A failed image leaves the dialogue as it was."""
        if not rest:
            raise LlavaError("/image needs an image", do="write /image PATH or /image URL")
        image = unquoted(rest)
        self._preview(self.dialogue.show(image))
        self.say("shown", image=image)

    def saved(self) -> Transcript:
        return self.dialogue.saved()

    def resume(self, chat: Transcript) -> None:
        self._preview(self.dialogue.load(chat))

    def _preview(self, decoded: Decoded | None) -> None:
        if decoded is not None:
            self.terminal.picture(
                self.dialogue.aligned.tower.preprocess.preview(decoded, side=PREVIEW_COLUMNS)
            )


def bare_image(line: str) -> str | None:
    """The image that the whole line is: an address, or the path of an image file, quoted or not."""
    if is_url(line):
        return line if len(line.split()) == 1 else None
    path = os.path.expanduser(unquoted(line))
    return path if Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path) else None
