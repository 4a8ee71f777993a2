"""Read-eval-print loop of a chat: a line is a command, or else a question."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infer.chat.dialogue import AnswerFigures, Dialogue
from infer.chat.messages import message
from infer.chat.transcript import Transcript, read_transcript, write_transcript
from llava_core.cli.command import INTERRUPTED, stop_signals
from llava_core.cli.console import table
from llava_core.cli.terminal import Terminal
from llava_core.cli.translation import error_line
from llava_core.errors import LlavaError, nearest
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

ALIASES = {"clear": "/clear", "exit": "/exit", "quit": "/exit"}
WITH_PATH = ("/image", "/save", "/load", "/compare")
ALONE = ("/sessions", "/lens", "/why", "/think", "/clear", "/retry", "/stats", "/help", "/exit")
"""Commands after which nothing is to be written."""


class ChatRepl:
    """The commands that every chat has; `run` returns at the end of input or at /exit."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self.commands = self.make_commands()
        self.terminal = Terminal(list(self.commands), WITH_PATH)
        self.answers = self.errors = 0

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        """Functions of the text after a command, by its name; MESSAGES explains them."""
        return {
            "/clear": self.clear,
            "/retry": self.retry,
            "/set": self.set,
            "/stats": self.stats,
            "/save": self.save,
            "/load": self.load,
            "/help": self.help,
            "/exit": self.leave,
        }

    def run(self) -> JsonDict:
        """Answer line by line; returns the number of turns and errors.

        Over a pipe, errors give exit code 1, and a command that fails ends the chat, since later lines count
        on it; a question that fails is skipped.
        """
        # Ctrl-C stops an answer only; the other signals end the command.
        for signum in stop_signals():
            if signum != signal.SIGINT:
                signal.signal(signum, lambda *_: sys.exit(INTERRUPTED))
        self.say("welcome")
        for line in self.terminal.lines():
            try:
                self.evaluate(line)
            except BrokenPipeError:  # the reader of the answers is gone
                raise
            except (LlavaError, OSError) as error:
                self.fail(error)
                if not self.terminal.live:
                    break
            except KeyboardInterrupt:  # while an image was loaded
                self.say("stopped")
            except EOFError:
                break
        figures = {"turns": self.answers, "errors": self.errors}
        return {**figures, "exit_code": 1} if self.errors and not self.terminal.live else figures

    def fail(self, error: Exception) -> None:
        self.errors += 1
        self.terminal.say(error_line(error), style="red")

    def evaluate(self, line: str) -> None:
        """Run a command or answer a question. Raises EOFError at /exit, LlavaError or OSError on failure."""
        name, _, rest = ALIASES.get(line.lower(), line).partition(" ")
        if name in self.commands:
            if rest.strip() and name in ALONE:
                raise LlavaError(f"{name} takes nothing after it", got=rest.strip(), do=f"write {name} alone")
            self.commands[name](rest.strip())
        elif re.fullmatch("/[a-z]+", name):
            raise LlavaError(f"no command {name}", do=nearest(name, list(self.commands)))
        else:
            self.ask(line)

    def ask(self, question: str) -> None:
        self._answer(self.dialogue.ask(question))

    def retry(self, rest: str) -> None:
        self._answer(self.dialogue.retry())

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        try:
            complete = self.terminal.answer(pieces)
        except LlavaError as error:
            self.fail(error)
            return
        self.answers += 1
        if not complete:
            self.say("stopped")
        elif self.terminal.live:
            self.say_figures(self.dialogue.figures)

    def say_figures(self, figures: AnswerFigures, before: str = "") -> None:
        """Show what an answer took, after the name of who gave it, if several did."""
        self.say("took", before=before, first=figures.first_s, rate=figures.tokens_per_s,
                 prefilled=figures.prefilled, cached=figures.cached)  # fmt: skip

    def clear(self, rest: str) -> None:
        self.dialogue.clear()
        self.say("cleared")

    def set(self, rest: str) -> None:
        if rest:
            self.dialogue.sampling = with_settings(self.dialogue.sampling, rest)
        values = dataclasses.asdict(self.dialogue.sampling)
        self.terminal.say(" ".join(f"{name}={_typed(value)}" for name, value in values.items()))

    def stats(self, rest: str) -> None:
        figures = self.dialogue.figures
        rows = {
            "turns": len(self.dialogue.messages) // 2,
            "prefilled tokens": figures.prefilled,
            "cached tokens": figures.cached,
            "answer tokens": figures.tokens,
            "time to first token": f"{figures.first_s:.3f}",
            "tokens/s": f"{figures.tokens_per_s:.1f}",
        }
        self.terminal.say(table([(message(name), value) for name, value in rows.items()]))

    def save(self, rest: str) -> None:
        path = self.path(rest, "/save")
        write_transcript(path, self.dialogue.transcript())
        self.say("saved", file=path)

    def load(self, rest: str) -> None:
        self.resume(read_transcript(self.path(rest, "/load")))
        self.say("loaded", turns=len(self.dialogue.messages) // 2)

    def resume(self, transcript: Transcript) -> None:
        self.dialogue.load(transcript)

    def help(self, rest: str) -> None:
        for name in self.commands:
            self.terminal.say(f"{name} {message(name)}")
        self.say("lines")
        self.say("keys")

    def leave(self, rest: str) -> None:
        raise EOFError

    def say(self, name: str, **values: object) -> None:
        """Show a message of MESSAGES, by its name."""
        self.terminal.say(message(name, **values), style="dim")

    @staticmethod
    def path(rest: str, command: str) -> Path:
        if not rest:
            raise LlavaError(f"{command} needs a file", do=f"write {command} FILE")
        return Path(unquoted(rest)).expanduser()


def with_settings(sampling: Sampling, settings: str) -> Sampling:
    """`sampling` changed by NAME=VALUE …, with the names of the flags.

    Raises LlavaError for an unknown name, or a value of another type or out of range.
    """
    values: dict[str, object] = {}
    for setting in _split(settings):
        typed, _, value = setting.removeprefix("--").partition("=")
        name = typed.replace("-", "_")
        kind = type(getattr(sampling, name, None))
        if kind not in (int, float, tuple):
            raise LlavaError(f"no setting {typed}", do=nearest(name, list(dataclasses.asdict(sampling))))
        if kind is tuple:
            earlier = values.get(name, ())
            assert isinstance(earlier, tuple)
            values[name] = (*earlier, value) if value else ()
            continue
        try:
            values[name] = kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise LlavaError(name, expected=expected, got=repr(value), do="write NAME=VALUE") from None
    return dataclasses.replace(sampling, **values)  # type: ignore[arg-type]


def _split(text: str) -> list[str]:
    """Words as a shell splits them. Raises LlavaError for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LlavaError(f"cannot read {text}", got=error) from None


def unquoted(text: str) -> str:
    """The path of a file dragged into a terminal, which pastes it quoted, with backslashes, or as file://."""
    try:
        if text.startswith("file://"):
            return unquote(urlsplit(text).path)
        (path,) = shlex.split(text)
    except ValueError:  # several words, or an apostrophe: a path that was typed as it is
        return text
    return path


def _typed(value: object) -> str:
    return shlex.join(value) if isinstance(value, tuple) else str(value)
