"""A chat about images: sessions, a second checkpoint beside the first, and what the image tells the model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from pathlib import Path

from infer.chat.image_dialogue import ImageDialogue
from infer.chat.messages import message
from infer.chat.readings import nearest_words, word_gains
from infer.chat.repl import ChatRepl, unquoted
from infer.chat.transcript import Transcript, write_transcript
from infer.chat.views import gain_text, session_table, word_grid
from infer.lens.readout import Vocabulary
from llava_core.cli.console import table
from llava_core.errors import LlavaError
from llava_core.vision.image_files import SUFFIXES, is_url

FIRST, SECOND = "A", "B"
"""Names of two checkpoints that answer beside each other."""


class ImageChatRepl(ChatRepl):
    """A chat about images: /image, and a line that is an image, begins a session about it."""

    dialogue: ImageDialogue

    def __init__(
        self,
        dialogue: ImageDialogue,
        checkpoint: Path,
        open_second: Callable[[Path], ImageDialogue],
    ) -> None:
        """`open_second` gives an empty dialogue with the models of another checkpoint than the dialogue's."""
        super().__init__(dialogue)
        self.sessions = [dialogue]
        self._checkpoints = {FIRST: str(checkpoint)}
        self._open_second = open_second
        self._second: ImageDialogue | None = None
        self._beside: dict[ImageDialogue, ImageDialogue] = {}
        """The second checkpoint's dialogue of each session that it has been asked in."""

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/image": self.image,
            "/sessions": self.list_sessions,
            "/session": self.session,
            "/compare": self.compare,
            "/lens": self.lens,
            "/why": self.why,
            **super().make_commands(),
        }

    def evaluate(self, line: str) -> None:
        if image := bare_image(line):
            self.image(image)
        else:
            super().evaluate(line)

    def image(self, rest: str) -> None:
        """Begin a session about an image. Raises LlavaError, and stays in this one, if that fails."""
        if not rest:
            raise LlavaError("/image needs an image", do="write /image PATH or /image URL")
        image, new = unquoted(rest), self.dialogue.another()
        new.show(image)
        self._enter(new)
        self.say("shown", image=image)

    def resume(self, transcript: Transcript) -> None:
        new = self.dialogue.another()
        new.load(transcript)
        self._enter(new)

    def list_sessions(self, rest: str) -> None:
        rows = []
        for number, session in enumerate(self.sessions, 1):
            mark = "*" if session is self.dialogue else ""
            first = session.messages[0]["content"] if session.messages else ""
            rows.append((f"{number}{mark}", len(session.messages) // 2, session.image or "", first))
        header = [message(name) for name in ("session", "turns", "image", "first question")]
        self.terminal.show(session_table(header, rows))

    def session(self, rest: str) -> None:
        if not (rest.isdecimal() and 1 <= int(rest) <= len(self.sessions)):
            expected = f"a number from 1 to {len(self.sessions)}"
            raise LlavaError("/session", expected=expected, got=rest or None, do="/sessions lists them")
        self._enter(self.sessions[int(rest) - 1])
        turns = len(self.dialogue.messages) // 2
        self.say("entered", number=rest, image=self.dialogue.image or "–", turns=turns)

    def compare(self, rest: str) -> None:
        """Let a second checkpoint answer, too; with no name, no longer."""
        if not rest and self._second is None:
            raise LlavaError("/compare needs a checkpoint", do="write /compare FOLDER, such as RUN/best")
        if not rest:
            self._second, self._beside = None, {}
            self.say("no comparison")
            return
        folder = Path(unquoted(rest)).expanduser()
        self._second, self._beside = self._open_second(folder), {}
        self._checkpoints[SECOND] = str(folder)
        self.say("comparison", **self._checkpoints)

    def ask(self, question: str) -> None:
        if self._second is None:
            super().ask(question)
        else:
            self._answer_both(lambda dialogue: dialogue.ask(question))

    def retry(self, rest: str) -> None:
        if self._second is None or not self.dialogue.messages:
            super().retry(rest)
            return
        question = self.dialogue.messages[-2]["content"]

        def again(dialogue: ImageDialogue) -> Generator[str, None, None]:
            """The second one may not have been asked yet, or have been stopped before its first word."""
            asked = bool(dialogue.messages) and dialogue.messages[-2]["content"] == question
            return dialogue.retry() if asked else dialogue.ask(question)

        self._answer_both(again)

    def clear(self, rest: str) -> None:
        for dialogue in self._dialogues().values():
            dialogue.clear()
        self.say("cleared")

    def save(self, rest: str) -> None:
        super().save(rest)
        if self._second is not None:
            path = self.path(rest, "/save")
            second = path.with_name(f"{path.stem}-{SECOND}{path.suffix}")
            write_transcript(second, self._dialogues()[SECOND].transcript())
            self.say("saved", file=second)

    def lens(self, rest: str) -> None:
        """Show the word nearest to each visual token. Raises LlavaError unless they are one grid."""
        for name, dialogue in self._dialogues().items():
            words, class_word = nearest_words(dialogue, self._vocabulary)
            assert dialogue.decoded is not None
            pixels = dialogue.decoded.pixels if self.terminal.coloured else None
            grid = word_grid(words, pixels, self.terminal.columns)
            title = message("lens", word=class_word) if class_word else message("lens without class")
            self.terminal.say(f"{name}: {title}" if self._second else title)
            self.terminal.show(grid)

    def why(self, rest: str) -> None:
        """How much loss the image saves each word of the last answer. Raises LlavaError if there is none."""
        header = [message(name) for name in ("word", "loss", "blank loss", "gain")]
        for name, dialogue in self._dialogues().items():
            if self._second is not None:
                self.terminal.say(f"{name}:")
            pieces, loss, blank = word_gains(dialogue)
            gains = [other - own for own, other in zip(loss, blank, strict=True)]
            if self.terminal.coloured:
                self.terminal.show(gain_text(pieces, gains))
            rows = zip(pieces, loss, blank, gains, strict=True)
            cells = [
                (piece, f"{a:.2f}", f"{b:.2f}", f"{round(gain, 2) + 0:+.2f}") for piece, a, b, gain in rows
            ]
            self.terminal.say(table(cells, header))

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        """Words of both checkpoints' language models, whose tokenizers are alike."""
        return Vocabulary(self.dialogue.aligned)

    def _dialogues(self) -> dict[str, ImageDialogue]:
        """This session's dialogue by the name of its checkpoint, and the second one's beside it."""
        if self._second is None:
            return {FIRST: self.dialogue}
        if self.dialogue not in self._beside:
            beside = self._second.another()
            if self.dialogue.image is not None and self.dialogue.decoded is not None:
                beside.show_decoded(self.dialogue.image, self.dialogue.decoded)
            self._beside[self.dialogue] = beside
        beside = self._beside[self.dialogue]
        beside.sampling = self.dialogue.sampling
        return {FIRST: self.dialogue, SECOND: beside}

    def _answer_both(self, ask: Callable[[ImageDialogue], Generator[str, None, None]]) -> None:
        failed: dict[str, LlavaError] = {}

        def pieces(name: str, dialogue: ImageDialogue) -> Generator[str, None, None]:
            try:
                yield from ask(dialogue)
            except LlavaError as error:
                failed[name] = error

        dialogues = self._dialogues()
        complete = self.terminal.answers(
            {
                f"{name}  {self._checkpoints[name]}" if self.terminal.live else name: pieces(name, dialogue)
                for name, dialogue in dialogues.items()
            }
        )
        for name, error in failed.items():
            self.fail(LlavaError(f"{name}: {error}"))
        self.answers += len(failed) < len(dialogues)
        if not complete:
            self.say("stopped")
        elif self.terminal.live:
            for name, dialogue in dialogues.items():
                if name not in failed:
                    self.say_figures(dialogue.figures, f"{name}: ")

    def _enter(self, session: ImageDialogue) -> None:
        """Go on with a session. The one left frees its cache; one in which nothing happened is forgotten."""
        left = self.dialogue
        session.sampling = left.sampling
        if session not in self.sessions:
            self.sessions.append(session)
        if session is not left:
            for dialogue in self._beside.get(left), left:
                if dialogue is not None:
                    dialogue.set_aside()
            if left.image is None and not left.messages:
                self.sessions.remove(left)
        self.dialogue = session
        if decoded := session.decoded:
            preprocess = session.aligned.tower.preprocess
            self.terminal.picture(lambda side: preprocess.preview(decoded, side))


def bare_image(line: str) -> str | None:
    """The image, if the whole line is a URL or the path of an image file, quoted or not."""
    if is_url(line):
        return line if len(line.split()) == 1 else None
    path = os.path.expanduser(unquoted(line))
    return path if Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path) else None
