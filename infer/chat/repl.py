"""A dialogue at the terminal: commands, and everything else is a question."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from infer.chat.dialogue import Dialogue
from infer.chat.messages import Messages
from infer.chat.transcript import Transcript, read_transcript, write_transcript
from llava_core.cli.command import INTERRUPTED, stop_signals
from llava_core.cli.console import table
from llava_core.cli.terminal import Terminal
from llava_core.errors import LlavaError, nearest
from llava_core.language.sampling import Sampling
from llava_core.types import JsonDict

PLAIN_WORDS = {"clear": "/clear", "exit": "/exit", "quit": "/exit"}
WITH_PATH = ("/image", "/save", "/load")


class Chat:
    """One person, one dialogue. `run` until they leave."""

    def __init__(self, dialogue: Dialogue, texts: Messages) -> None:
        self.dialogue, self.texts = dialogue, texts
        self.commands = self.make_commands()
        self.terminal = Terminal(list(self.commands), WITH_PATH)
        self.answers = self.errors = 0

    def make_commands(self) -> dict[str, Callable[[str], None]]:
        """By name, each with what to do with the words after it; MESSAGES explains them."""
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
        """The summary: turns, errors.

        Over a pipe errors make exit code 1. A command that fails ends it there, since what follows counts on
        it; a question that fails is left out.
        """
        # Ctrl-C stops an answer only; the other signals end the command.
        for signum in stop_signals():
            if signum != signal.SIGINT:
                signal.signal(signum, lambda *_: sys.exit(INTERRUPTED))
        self.say("welcome")
        for line in self.terminal.lines():
            try:
                self.obey(line)
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (LlavaError, OSError) as error:
                self.fail(error)
                if not self.terminal.live:
                    break
            except KeyboardInterrupt:  # while an image was read
                self.say("stopped")
            except EOFError:
                break
        figures = {"turns": self.answers, "errors": self.errors}
        return {**figures, "exit_code": 1} if self.errors and not self.terminal.live else figures

    def fail(self, error: Exception) -> None:
        self.errors += 1
        self.terminal.say(self.texts("error", error=error), style="red")

    def obey(self, line: str) -> None:
        """Raises EOFError to leave, and LlavaError or OSError for what could not be done."""
        name, _, rest = PLAIN_WORDS.get(line.lower(), line).partition(" ")
        if name in self.commands:
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
            whole = self.terminal.answer(pieces)
        except LlavaError as error:
            self.fail(error)
            return
        self.answers += 1
        if not whole:
            self.say("stopped")
        elif self.terminal.live:
            took = self.dialogue.figures
            self.say("took", first=took.first_s, rate=took.tokens_per_s,
                     prefilled=took.prefilled, cached=took.cached)  # fmt: skip

    def clear(self, rest: str) -> None:
        self.dialogue.clear()
        self.say("cleared")

    def set(self, rest: str) -> None:
        if rest:
            self.dialogue.sampling = changed(self.dialogue.sampling, rest)
        values = dataclasses.asdict(self.dialogue.sampling)
        self.terminal.say(" ".join(f"{name}={_written(value)}" for name, value in values.items()))

    def stats(self, rest: str) -> None:
        took, texts = self.dialogue.figures, self.texts
        rows = {
            "turns": len(self.dialogue.messages) // 2,
            "prefilled tokens": took.prefilled,
            "cached tokens": took.cached,
            "answer tokens": took.tokens,
            "time to first token": f"{took.first_s:.3f}",
            "tokens/s": f"{took.tokens_per_s:.1f}",
        }
        self.terminal.say(table([(texts(name), value) for name, value in rows.items()]))

    def save(self, rest: str) -> None:
        path = self.path(rest, "/save")
        write_transcript(path, self.saved())
        self.say("saved", file=path)

    def load(self, rest: str) -> None:
        chat = read_transcript(self.path(rest, "/load"))
        self.resume(chat)
        self.say("loaded", turns=len(chat.messages) // 2)

    def saved(self) -> Transcript:
        return Transcript(None, self.dialogue.messages)

    def resume(self, chat: Transcript) -> None:
        """Go on with `chat`. Raises LlavaError for one about an image."""
        if chat.image is not None:
            raise LlavaError(f"this dialogue is about {chat.image}", do="go on with it in `infer chat`")
        self.dialogue.begin(self.dialogue.nothing())
        self.dialogue.messages = [*chat.messages]

    def help(self, rest: str) -> None:
        for name in self.commands:
            self.terminal.say(f"{name} {self.texts(name)}")
        self.say("lines")
        self.say("keys")

    def leave(self, rest: str) -> None:
        raise EOFError

    def say(self, phrase: str, **values: object) -> None:
        self.terminal.say(self.texts(phrase, **values), style="dim")

    @staticmethod
    def path(rest: str, command: str) -> Path:
        if not rest:
            raise LlavaError(f"{command} needs a file", do=f"write {command} FILE")
        return Path(unquoted(rest)).expanduser()


def changed(sampling: Sampling, settings: str) -> Sampling:
    """`sampling` after NAME=VALUE …, with the names of the flags.

    Raises LlavaError for an unknown name, or a value that is of another kind or out of range.
    """
    values: dict[str, object] = {}
    for setting in words(settings):
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


def words(text: str) -> list[str]:
    """Split as a shell does. Raises LlavaError for a quote without its partner."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise LlavaError(f"cannot read {text}", got=error) from None


def unquoted(text: str) -> str:
    """A path as terminals paste a file that is dragged in: in quotes, with backslashes, or as file://."""
    try:
        if text.startswith("file://"):
            return unquote(urlsplit(text).path)
        (path,) = shlex.split(text)
    except ValueError:  # several words, or an apostrophe: a path that was typed as it is
        return text
    return path


def _written(value: object) -> str:
    return shlex.join(value) if isinstance(value, tuple) else str(value)
