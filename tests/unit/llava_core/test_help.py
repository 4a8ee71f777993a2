"""Pages of help, and what is said of a mistyped command or flag."""

from __future__ import annotations

import importlib
import shlex

import pytest

from llava_core.cli.arguments import parsed
from llava_core.cli.console import width
from llava_core.cli.flags import flags_of, help_texts
from llava_core.cli.help import command_page, overview
from llava_core.cli.options import GROUPS, Command
from llava_core.cli.settings import with_settings
from llava_core.cli.translation import CHOSEN
from tests.support.commands import run

PROGRAMS = ("extract", "train", "infer", "llava_align")
COMMANDS: list[tuple[str, str, Command]] = [
    (program, name, command)
    for program in PROGRAMS
    for name, command in importlib.import_module(f"{program}.__main__").COMMANDS.items()
]
RUN = ["run", "--features", "a", "--llm", "b", "--out", "c"]
every_command = pytest.mark.parametrize(
    ("program", "name", "command"), COMMANDS, ids=[f"{program}-{name}" for program, name, _ in COMMANDS]
)


@every_command
def test_the_example_is_a_call_that_can_be_made(program: str, name: str, command: Command) -> None:
    parsed(command, with_settings(command, shlex.split(command.example)))


@every_command
@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_fit_the_terminal(
    program: str, name: str, command: Command, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHOSEN, language)
    for columns in (60, 80, 100):
        page = command_page(program, name, command, columns)
        words = [line for line in page.split("\n") if width(line) > columns and " " in line.strip()]
        assert [line for line in words if not line.strip().startswith("-")] == []
        assert all(not line.lstrip().startswith(tuple("，。；：）")) for line in page.split("\n"))


@every_command
def test_every_flag_has_a_text_and_a_group(program: str, name: str, command: Command) -> None:
    flags, texts = flags_of(command.config), help_texts(command.config)
    assert [flag.name for flag in flags if not texts.get(flag.field)] == []
    named = {
        field: group
        for kind in command.config.__mro__
        for group, fields in vars(kind).get("groups", {}).items()
        for field in fields.split()
    }
    assert set(named) <= {flag.field for flag in flags}
    assert set(named.values()) <= {"", *GROUPS[1:-1]}  # "" is on no page
    assert command.subject in ("", *(flag.field for flag in flags))
    page = command_page(program, name, command, 100)
    assert [flag.name for flag in flags if flag.group and f"  {flag.name}" not in page] == []
    assert "{None}" not in page
    assert "default: None" not in page


def test_required_flags_come_first() -> None:
    page = run("train", "sweep", "--help").out
    places = [page.index(f"\n{group}\n") for group in GROUPS if f"\n{group}\n" in page]
    assert places == sorted(places)
    assert page.index("--space") < page.index("\nOften changed\n") < page.index("--micro-tokens")
    assert "python -m train sweep --features features/train" in page.split("\n\n")[1]


def test_without_a_command_all_are_listed() -> None:
    ended = run("extract", code=2, COLUMNS="80")
    assert "retry-failed" in ended.out
    assert ended.out == overview("python -m extract", "Encode images once, into feature shards.",
                                 importlib.import_module("extract.__main__").COMMANDS, 80) + "\n"  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["runn"], "python -m train has no command runn; did you mean 'run'?"),
        (["run", "--feature", "x"], "unknown flag --feature; did you mean '--features'?"),
        (["run", "--no-lr"], "unknown flag --no-lr; did you mean '--lr'?"),
        (["run", "-features", "x"], "'-features' stands behind no flag; did you mean '--features'?"),
        (["run", "--recpe", "fast"], "unknown flag --recpe; did you mean '--recipe'?"),
        (["run", "--zzzz"], "unknown flag --zzzz; --help lists the flags"),
        (["run", "--lr"], "--lr needs a value; expected --lr X"),
        (["run", "--lr", "--llm", "x"], "--lr needs a value; expected --lr X"),
        (
            ["run", "--llm", "-x"],
            "--llm needs a value; expected --llm PATH; write --llm=-x if that is its value",
        ),
        ([*RUN, "--lr", "-1e-3"], "--lr; expected a number above 0; got -0.001"),
        ([*RUN, "--json=3"], "--json takes no value; got 3; write --json or --no-json"),
        ([*RUN[:-1], ""], "--out; expected a path; got nothing"),
        ([*RUN, "--", "x"], "unknown flag --; --help lists the flags"),
        (["run", "--recipe", "fast", "--recipe=fast"], "--recipe is given twice; give it once"),
        ([*RUN, "--lr", "much"], "--lr; expected a number; got much"),
        ([*RUN, "--epochs", "1.5"], "--epochs; expected a whole number; got 1.5"),
        ([*RUN, "--decay", "x"], "--decay; expected cosine, linear; got x"),
        (
            ["sweep", *RUN[1:], "--eval-features", "e", "--space", "lr=1", "--together", "x"],
            "--together; expected a whole number or auto; got x",
        ),
        (["run", "--out", "x"], "not given: --features PATH … --llm PATH; --help explains each flag"),
        (["eval", "a", "b"], "--checkpoint; expected one value; got a b"),
        (["eval", "a", "--checkpoint", "b"], "'a' stands behind no flag; --help lists the flags"),
        (["--lang", "fr", "run"], "--lang; expected en, zh, auto; got fr"),
    ],
)
def test_a_mistyped_word(words: list[str], line: str) -> None:
    assert run("train", *words, code=2).one_line() == f"error: {line}"


def test_what_a_command_reads_may_stand_without_its_flag() -> None:
    for words in (["none"], ["--html", "page.html", "none"], ["none", "--sample", "3"], ["--out", "none"]):
        assert "no feature folder none" in run("extract", "inspect", *words, code=1).one_line()
