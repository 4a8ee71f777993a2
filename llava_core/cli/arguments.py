"""Typed words to a command's dataclass, by argparse; a mistake is one line that says what was meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from llava_core.cli.flags import Flag, flags_of
from llava_core.cli.options import Command, Options
from llava_core.errors import LlavaError, nearest

SETTINGS = ("-c", "--recipe", "--lang", "--help")
"""Flags that are replaced before the others are read."""
NEGATIVE = re.compile(r"-\.?\d|-inf$")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise LlavaError in place of printing a usage line."""
        raise LlavaError(message, exit_code=2)


def parsed(command: Command, argv: Sequence[str]) -> Options:
    """The flags in `argv` as the command's dataclass.

    Words that stand behind no flag are the command's subject. Raises LlavaError (wrong usage) for a flag that
    is unknown, lacks its value or has one of another kind, and for one that must be given and is not.
    """
    flags = {flag.name: flag for flag in flags_of(command.config)}
    given, words = _read(flags, [_dashed(word) for word in argv])
    subject = flags.get(f"--{command.subject}")
    if words and (subject is None or subject.field in given):
        raise LlavaError(f"{words[0]!r} stands behind no flag", do=_meant(words[0], flags), exit_code=2)
    if words and subject is not None:
        if len(words) > 1 and not subject.several:
            raise LlavaError(subject.name, expected="one value", got=" ".join(words), exit_code=2)
        given[subject.field] = words if subject.several else words[0]
    missing = [flag for flag in flags.values() if flag.required and flag.field not in given]
    if missing:
        names = " ".join(f"{flag.name} {flag.value}" for flag in missing)
        raise LlavaError(f"not given: {names}", do="--help explains each flag", exit_code=2)
    return command.config(**{name: _converted(flags, name, value) for name, value in given.items()})


def _read(flags: dict[str, Flag], argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Words by the field of their flag, and those behind none."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in flags.values():
        options: dict[str, Any] = {"dest": flag.field}
        if flag.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif flag.appended:
            options["action"] = "append"
        elif flag.count != 1:
            options["nargs"] = flag.count
        parser.add_argument(flag.name, **options)
    for at, word in enumerate(argv):
        name, sign, value = word.partition("=")
        meant = flags.get(name) or flags.get(name.replace("--no-", "--", 1))
        if name.startswith("--") and (meant is None or (name not in flags and meant.kind is not bool)):
            raise LlavaError(f"unknown flag {name}", do=_meant(name, flags), exit_code=2)
        if meant is not None and meant.kind is bool and sign:
            do = f"write {meant.name} or --no-{meant.name[2:]}"
            raise LlavaError(f"{name} takes no value", got=value, do=do, exit_code=2)
        if meant is None or meant.count in (0, "*") or sign:
            continue
        following = argv[at + 1] if at + 1 < len(argv) else ""
        dashed = following[:1] == "-" and len(following) > 1 and " " not in following
        if NEGATIVE.match(following):  # argparse takes -1 for a value, and -1e-3 for a flag
            argv[at : at + 2] = [f"{name}={following}"]
        elif at + 1 == len(argv) or dashed:
            known = not dashed or following.startswith("--")
            advice = None if known else f"write {name}={following} if that is its value"
            raise LlavaError(
                f"{name} needs a value", expected=f"{name} {meant.value}", do=advice, exit_code=2
            )
    found, words = parser.parse_known_args(argv)
    return vars(found), words


def _dashed(word: str) -> str:
    """--max_steps=3 as --max-steps=3."""
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value if word.startswith("--") else word


def _meant(word: str, flags: dict[str, Flag]) -> str:
    """Advice for a word that names no flag."""
    named = word.startswith("-") and word.strip("-")
    meant = nearest("--" + word.lstrip("-"), [*flags, *SETTINGS]) if named else ""
    return meant if meant.startswith("did") else "--help lists the flags"


def _converted(flags: dict[str, Flag], name: str, value: Any) -> Any:
    flag = flags[f"--{name.replace('_', '-')}"]
    if isinstance(value, bool):
        return value
    try:
        if isinstance(value, list):
            return tuple(map(flag.converted, value))
        return flag.converted(value)
    except ValueError as error:
        got = str(error) or "nothing"
        raise LlavaError(flag.name, expected=flag.expected, got=got, exit_code=2) from None
