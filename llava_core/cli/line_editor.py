"""The chat's input line: history, several lines, completion of commands and paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input.typeahead import store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress


class LineEditor:
    """Input of one entry at a time; Enter ends it, Alt+Enter or a backslash before Enter adds a line."""

    def __init__(self, commands: Sequence[str], with_path: Sequence[str]) -> None:
        """Tab completes `commands`, and a path after those in `with_path`."""
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=history(),
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            completer=_Completer(commands, with_path),
            complete_while_typing=False,
        )

    def read(self) -> str:
        """The next entry. Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C."""
        return self._session.prompt()

    def typed(self, text: str) -> None:
        """Take what was typed before the prompt came."""
        keys: list[KeyPress] = []
        Vt100Parser(keys.append).feed_and_flush(text)
        store_typeahead(self._session.input, keys)


class _Completer(Completer):
    def __init__(self, commands: Sequence[str], with_path: Sequence[str]) -> None:
        self._commands, self._with_path = commands, with_path
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        command, space, path = typed.partition(" ")
        if command in self._with_path and space:
            yield from self._paths.get_completions(Document(path), complete_event)
        elif typed.startswith("/"):
            yield from (Completion(c, -len(typed)) for c in self._commands if c.startswith(typed))


def history(environment: Mapping[str, str] = os.environ) -> History:
    """History file in the user's state folder, readable by its owner only; in memory if that cannot be."""
    state = environment.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    file = Path(state, "llava-align", "history")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except (OSError, RuntimeError):  # no such home, or none that we may write to
        return InMemoryHistory()
    return FileHistory(str(file))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
