"""Configuration files (`-c run.yaml`) and recipes (`--recipe NAME`), turned into flags; typed flags win."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llava_core.cli.flags import Flag, flags_of
from llava_core.cli.options import Command
from llava_core.errors import LlavaError, first_line, nearest


def with_settings(command: Command, argv: list[str]) -> list[str]:
    """Replace `-c FILE` and `--recipe NAME` by their flags. Typed flags win, then those of the file."""
    flags = {flag.field: flag for flag in flags_of(command.config)}
    known = [*flags, *(["recipe"] if command.recipes else []), "lang"]
    for flag in flags.values():
        if flag.several and not flag.appended and _typed(argv).count(flag.name) > 1:
            do = "give it once, with all its values"
            raise LlavaError(f"{flag.name} is given twice", do=do, exit_code=2)
    argv = _expanded(argv, flags, "-c", "run.yaml", lambda path: read_settings(Path(path), known))
    if not command.recipes:
        return argv
    return _expanded(
        argv, flags, "--recipe", next(iter(command.recipes)), lambda name: _recipe(command, name)
    )


def _typed(argv: Sequence[str]) -> list[str]:
    """Names of the flags among these words."""
    return [word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")]


def _recipe(command: Command, name: str) -> Mapping[str, Any]:
    if name not in command.recipes:
        expected = ", ".join(command.recipes)
        raise LlavaError(f"unknown --recipe {name!r}", expected=expected, exit_code=2)
    return command.recipes[name]


def _expanded(
    argv: list[str],
    flags: Mapping[str, Flag],
    option: str,
    example: str,
    settings: Callable[[str], Mapping[str, Any]],
) -> list[str]:
    """Replace `option` and its value by the flags that `settings` gives for it, without those in `argv`."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(f"{option}=") else [arg])]
    if option not in argv:
        return argv
    at = argv.index(option)
    if at + 1 == len(argv):
        raise LlavaError(f"{option} needs a value", do=f"write {option} {example}", exit_code=2)
    named, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    if option in rest:
        raise LlavaError(f"{option} is given twice", do="give it once", exit_code=2)
    typed = set(_typed(rest))
    words: list[str] = []
    for key, value in settings(named).items():
        name = "--" + key.replace("_", "-")
        if value is None or name in typed or name.replace("--", "--no-", 1) in typed:
            continue
        flag = flags.get(key.replace("-", "_"))
        if flag is not None and flag.kind is bool:
            words.append(_switch(name, value))
            continue
        on = SWITCH.get(str(value).lower())
        if on is not None and flag is not None and "on" in typing.get_args(flag.kind):
            value = "on" if on else "off"  # YAML's other words for it
        if isinstance(value, list) and (flag is None or not flag.listed):
            expected, got = "one value", f"a list of {len(value)}"
            raise LlavaError(f"{key} in {named}", expected=expected, got=got, exit_code=2)
        again = flag is not None and flag.appended
        for each in value if again and isinstance(value, list) else [value]:
            # A text such as --x is a value only behind an equals sign.
            words += [name, *map(str, each)] if isinstance(each, list) else [f"{name}={each}"]
    return words + rest


SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What YAML 1.1 calls booleans."""


def _switch(flag: str, value: object) -> str:
    on = SWITCH.get(str(value).lower())
    if on is None:
        raise LlavaError(flag, expected="true or false", got=value, exit_code=2)
    return flag if on else flag.replace("--", "--no-", 1)


SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "value")}
"""YAML tags of scalars that are one word on the command line."""


def read_settings(path: Path, known: Sequence[str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file: keys as Python names; values as text exactly as written, or lists of it.

    None stands for a key without a value. Values stay text so that 010 remains ten. Raises LlavaError (exit
    code 2) for a missing file, one that is no mapping, a value of another kind, or a key that is repeated or
    not in `known`.
    """
    try:
        top = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        at = getattr(error, "problem_mark", None)
        got = f"{getattr(error, 'problem', None)} in line {at.line + 1}" if at else first_line(error)
        raise LlavaError(f"cannot read settings from {path}", got=got, exit_code=2) from None
    if not isinstance(top, yaml.MappingNode):
        got = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a word"}.get(type(top), "nothing")
        raise LlavaError(f"{path} holds no settings", expected="key: value lines", got=got, exit_code=2)
    settings: dict[str, Any] = {}
    for key, value in top.value:
        where = f"in line {key.start_mark.line + 1} of {path}"
        name = str(key.value).replace("-", "_") if isinstance(key, yaml.ScalarNode) else None
        if name is None:
            raise LlavaError(f"no key {where}", expected="key: value", exit_code=2)
        if known is not None and name not in known:
            raise LlavaError(f"unknown key {key.value!r} in {path}", do=nearest(name, known), exit_code=2)
        if name in settings:
            raise LlavaError(f"{path} has the key {name!r} twice", do="keep one", exit_code=2)
        if value.tag == "tag:yaml.org,2002:seq":
            settings[name] = [_word(each, where) for each in value.value]
        else:
            settings[name] = None if value.tag == "tag:yaml.org,2002:null" else _word(value, where)
    return settings


def _word(node: yaml.Node, where: str) -> str:
    """Text of a YAML scalar as written. Raises LlavaError (wrong usage) for anything else."""
    text = str(node.value)
    if node.tag in SCALARS and "\0" not in text and text == text.encode(errors="replace").decode():
        return text
    got = ascii(text) if node.tag in SCALARS else node.tag.replace("tag:yaml.org,2002:", "!!")
    expected = "a number, a text, or a list of them"
    raise LlavaError(f"a value {where}", expected=expected, got=got, exit_code=2)
