"""Pages of help: of a program its commands, of a command its flags in groups, required ones first."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from llava_core.cli.console import width
from llava_core.cli.flags import Flag, flags_of, help_texts, paragraphs
from llava_core.cli.options import GROUPS, Command
from llava_core.cli.translation import LANGUAGES, translated

LEFT, NARROW = 26, 72
"""Columns of the flags; and of a terminal under which their texts stand below them."""
OPENING, CLOSING = "（【《「『“‘", "，。、；：？！）】》」』”’…"
"""Chinese punctuation that ends no line, and that begins none."""


def overview(prog: str, description: str, commands: Mapping[str, Command], columns: int) -> str:
    """All commands of a program, one paragraph each."""
    rows = [(name, translated(paragraphs(command.config.__doc__)[0])) for name, command in commands.items()]
    parts = [
        "\n".join(_wrapped(translated(description), columns)),
        f"  {prog} {translated('COMMAND')} --help",
        translated("Commands") + "\n" + "\n".join(_rows(rows, columns)),
    ]
    return "\n\n".join(parts)


def command_page(prog: str, name: str, command: Command, columns: int) -> str:
    """What a command does, a call to copy, and its flags by group."""
    first, *rest = map(translated, paragraphs(command.config.__doc__))
    parts = ["\n".join(_wrapped(first, columns)), _call(f"{prog} {name}", command, columns)]
    parts += ["\n".join(_wrapped(text, columns)) for text in rest]
    flags, texts = flags_of(command.config), help_texts(command.config)
    for group in GROUPS:
        rows = [
            (f"{flag.names} {flag.value}".rstrip(), _text(flag, texts, command))
            for flag in flags
            if flag.group == group
        ]
        rows += _settings(command) if group == GROUPS[1] else []
        if rows:
            parts.append(translated(group) + "\n" + "\n".join(_rows(rows, columns)))
    return "\n\n".join(parts)


def _settings(command: Command) -> list[tuple[str, str]]:
    """Flags that stand for others, or for no field."""
    recipes, languages = (f"{{{','.join(each)}}}" for each in (command.recipes, LANGUAGES))
    recipe = (f"--recipe {recipes}", translated("Named set of flags; those of -c FILE and those typed win."))
    return [
        *([recipe] if command.recipes else []),
        ("-c FILE", translated("YAML file of flags (key: value); those typed win.")),
        (f"--lang {languages}", translated("Language of what the command prints; by default the locale's.")),
    ]


def _text(flag: Flag, texts: Mapping[str, str], command: Command) -> str:
    """A flag's help with what it takes besides."""
    notes = [translated("may be repeated")] * flag.appended
    notes += [translated("or without the flag")] * (command.subject == flag.field)
    notes += [translated(f"default: {flag.shown_default}")] * bool(flag.shown_default)
    return translated(texts.get(flag.field, "")) + (f" ({'; '.join(notes)})" if notes else "")


def _call(start: str, command: Command, columns: int) -> str:
    """The example, its lines ended as a shell continues them."""
    words, line, lines = shlex.split(command.example), f"  {start}", []
    for at, word in enumerate(words):
        quoted = shlex.quote(word)
        beyond = len(words) > at + 1 and word.startswith("-") and not words[at + 1].startswith("-")
        reach = len(quoted) + (1 + len(shlex.quote(words[at + 1])) if beyond else 0)
        if width(line) + 3 + reach > columns and line.strip():
            lines.append(f"{line} \\")
            line = "     "
        line += f" {quoted}"
    return "\n".join([*lines, line])


def _rows(rows: Iterable[tuple[str, str]], columns: int) -> Iterable[str]:
    """Two columns; one below the other in a narrow terminal."""
    for name, text in rows:
        left = LEFT if columns >= NARROW else 6
        lines = _wrapped(text, columns - left)
        head = f"  {name}"
        if columns >= NARROW and width(head) < left - 1 and lines:
            head = head + " " * (left - width(head)) + lines.pop(0)
        yield head
        yield from (" " * left + line for line in lines)


def _wrapped(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces and between Chinese characters."""
    lines, line = [], ""
    for piece in _pieces(text):
        if line and width(line) + width(piece.rstrip()) > columns:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line.rstrip()] if line else lines


def _pieces(text: str) -> Sequence[str]:
    """Stretches between which a line may break."""
    wide = "".join({c for c in text if unicodedata.east_asian_width(c) in "WF"} - {*OPENING, *CLOSING})
    if not wide:
        return re.findall(r"\s*\S+", text)
    word = rf"[{wide}]|[^\s{wide}{OPENING}{CLOSING}]+"
    return re.findall(rf"\s*[{OPENING}]*(?:{word})?[{CLOSING}]+|\s*[{OPENING}]*(?:{word})", text)
