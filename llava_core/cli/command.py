"""How every command starts and ends: flags, `-c run.yaml`, exit codes, `--json`.

A command is a frozen dataclass (its fields are the flags, their docstrings the help) and a function that
takes it. The function is named by a string and imported only once the flags are right: `--help` is instant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from llava_core.cli.console import guard_terminal, say, show, visible
from llava_core.errors import LlavaError, first_line, nearest

INTERRUPTED = 130
OUT_OF_MEMORY = "lower --micro-tokens of train, --batch-size of extract or infer batch, --slots of serve"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags that every command has."""

    json: bool = False
    """Make the last line of standard output one JSON object with the figures of the summary."""

    def require_inputs(self) -> None:
        """Raise LlavaError for files and folders that are seen to be wrong without reading them.

        Called before what runs is imported: torch takes seconds.
        """

    def require_above_zero(self, *names: str) -> None:
        """Raise LlavaError (wrong usage) unless these flags are finite numbers above 0, or None."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LlavaError(
                    f"--{name.replace('_', '-')}", expected="a number above 0", got=value, exit_code=2
                )


@dataclasses.dataclass(frozen=True)
class Command:
    """One subcommand: its flags and, as "module:function", what it runs."""

    config: type[Options]
    target: str
    recipes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Values of several flags by the name that `--recipe` gives them."""
    continues: bool = False
    """Whether the same command goes on where an interrupted one stopped."""


def main(
    prog: str, description: str, commands: Mapping[str, Command], argv: Sequence[str] | None = None
) -> NoReturn:
    """Parse, run, and leave the process with DESIGN's exit code."""
    guard_terminal()
    for signum in stop_signals():
        if signum != signal.SIGINT:  # which raises by itself
            signal.signal(signum, _interrupt)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text in another encoding ends no command
            stream.reconfigure(errors="replace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _interrupts_kept():
            code = _run(prog, description, commands, argv)
    except LlavaError as error:
        say(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        continues = bool(argv) and argv[0] in commands and commands[argv[0]].continues
        say("interrupted; the same command continues where it stopped" if continues else "interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        say(f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        code = 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which takes seconds to import
            raise
        say(f"error: the GPU's memory is full; {OUT_OF_MEMORY}; {first_line(error)}")
        code = 1
    sys.exit(code)


def _run(prog: str, description: str, commands: Mapping[str, Command], argv: list[str]) -> int:
    name = argv[0] if argv and argv[0] in commands else None
    if name is not None:
        argv = [name, *_with_settings(commands[name], argv[1:])]
    config = tyro.extras.subcommand_cli_from_dict(
        {name: command.config for name, command in commands.items()},
        prog=prog,
        description=f"{description}\n\n-c FILE.yaml reads flags from a file; those typed win.",
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    config.require_inputs()
    module, function = commands[argv[0]].target.split(":")
    summary: dict[str, Any] = getattr(importlib.import_module(module), function)(config) or {}
    code = int(summary.pop("exit_code", 0))
    if config.json:
        show(visible(json.dumps(summary, ensure_ascii=False, default=str)))
    return code


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks a command to stop: Ctrl-C, SIGTERM, and SIGHUP, unless that is ignored (`nohup`)."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Python drops what is raised in a `__del__` or a weak reference's callback: an interrupt comes again."""
    others = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            again = threading.main_thread().ident, signal.SIGTERM
            threading.Timer(0.01, signal.pthread_kill, again).start()  # after the callback
        else:
            others(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others


def _with_settings(command: Command, argv: list[str]) -> list[str]:
    """Replace `-c FILE` and `--recipe NAME` by their flags: those typed win, then those of the file."""
    config = command.config
    known = [*(field.name for field in dataclasses.fields(config)), *(["recipe"] if command.recipes else [])]
    _require_once(config, argv)
    argv = _expanded(argv, config, "-c", "run.yaml", lambda path: read_settings(Path(path), known))
    if not command.recipes:
        return argv
    return _expanded(
        argv, config, "--recipe", next(iter(command.recipes)), lambda name: _recipe(command, name)
    )


def _require_once(config: type[Options], argv: list[str]) -> None:
    """Of a list that is typed twice, the first would be forgotten; of one value the last wins, as usual."""
    names = [arg.split("=")[0].replace("_", "-") for arg in argv if arg.startswith("--")]
    for field in dataclasses.fields(config):
        name = f"--{field.name.replace('_', '-')}"
        if names.count(name) > 1 and str(field.type).startswith("tuple"):
            raise LlavaError(f"{name} is given twice", do="give it once, with all its values", exit_code=2)


def _repeats(field: dataclasses.Field[Any]) -> bool:
    """Whether a flag may be given again and again."""
    return "UseAppendAction" in str(field.type)


def _recipe(command: Command, name: str) -> Mapping[str, Any]:
    if name not in command.recipes:
        expected = " or ".join(command.recipes)
        raise LlavaError(f"unknown --recipe {name!r}", expected=expected, exit_code=2)
    return command.recipes[name]


def _expanded(
    argv: list[str],
    config: type[Options],
    option: str,
    example: str,
    settings: Callable[[str], Mapping[str, Any]],
) -> list[str]:
    """Put the flags in `settings` of its value in the place of `option`, less those in `argv`."""
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith(f"{option}=") else [arg])]
    if option not in argv:
        return argv
    at = argv.index(option)
    if at + 1 == len(argv):
        raise LlavaError(f"{option} needs a value", do=f"write {option} {example}", exit_code=2)
    named, rest = argv[at + 1], argv[:at] + argv[at + 2 :]
    typed = {arg.split("=")[0].replace("_", "-") for arg in rest if arg.startswith("--")}
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config)
    flags: list[str] = []
    for key, value in settings(named).items():
        flag = "--" + key.replace("_", "-")
        if value is None or flag in typed or flag.replace("--", "--no-", 1) in typed:
            continue
        field = fields.get(key.replace("-", "_"))
        if field is not None and field.type == "bool":
            flags.append(_switch(flag, value))
            continue
        on = SWITCH.get(str(value).lower())
        if on is not None and field is not None and "on" in typing.get_args(hints[field.name]):
            value = "on" if on else "off"  # YAML's other words for it
        if isinstance(value, list) and (field is None or "tuple" not in str(field.type)):
            expected, got = "one value", f"a list of {len(value)}"
            raise LlavaError(f"{key} in {named}", expected=expected, got=got, exit_code=2)
        again = field is not None and _repeats(field)
        for each in value if again and isinstance(value, list) else [value]:
            # A text such as --x is a value only behind an equals sign.
            flags += [flag, *map(str, each)] if isinstance(each, list) else [f"{flag}={each}"]
    return flags + rest


SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What YAML 1.1 calls booleans."""


def _switch(flag: str, value: object) -> str:
    on = SWITCH.get(str(value).lower())
    if on is None:
        raise LlavaError(flag, expected="true or false", got=value, exit_code=2)
    return flag if on else flag.replace("--", "--no-", 1)


SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "value")}
"""YAML's tags of what is one word, on the command line, too."""


def read_settings(path: Path, known: Sequence[str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, its keys as Python's names: words, or lists of words, as they are written
    (so that 010 stays ten); None for a key without a value.

    Raises LlavaError (exit code 2) for a missing file, one that is no mapping, a value of another kind, or a
    key that is there twice or none of `known`.
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
    """A YAML scalar as it is written. Raises LlavaError (wrong usage) for anything else."""
    text = str(node.value)
    if node.tag in SCALARS and "\0" not in text and text == text.encode(errors="replace").decode():
        return text
    got = ascii(text) if node.tag in SCALARS else node.tag.replace("tag:yaml.org,2002:", "!!")
    expected = "a number, a text, or a list of them"
    raise LlavaError(f"a value {where}", expected=expected, got=got, exit_code=2)
