"""`infer chat`: a dialogue about images at the terminal, or over a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from infer.aligned_model import open_engine
from infer.chat.image_dialogue import Session
from infer.chat.messages import Phrases, pick_language
from infer.chat.repl import Chat, unquoted
from infer.chat.transcript import SavedChat
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
    session = Session(open_engine(config), sampling_of(config))
    session.allow_private = config.allow_private
    if config.compile:
        say("compiling the step for one token")
        session.compiled = CompiledStep(session.llm)
        session.compiled.warm_up()
    chat = ImageChat(session, Phrases(pick_language(config.lang)))
    if config.image:
        chat.image(config.image)
    else:
        chat.say("welcome image")
    return chat.run()


class ImageChat(Chat):
    """A chat whose talk is a Session."""

    def __init__(self, session: Session, phrases: Phrases) -> None:
        self.session = session
        super().__init__(session, phrases)

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
        self._picture(self.session.show(image))
        self.say("shown", image=image)

    def saved(self) -> SavedChat:
        return self.session.saved()

    def resume(self, chat: SavedChat) -> None:
        self._picture(self.session.load(chat))

    def _picture(self, decoded: Decoded | None) -> None:
        if decoded is not None:
            self.terminal.picture(self.session.engine.tower.preprocess.preview(decoded, side=PREVIEW_COLUMNS))


def bare_image(line: str) -> str | None:
    """The image that the whole line is: an address, or the path of an image file, quoted or not."""
    if is_url(line):
        return line if len(line.split()) == 1 else None
    path = os.path.expanduser(unquoted(line))
    return path if Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path) else None
