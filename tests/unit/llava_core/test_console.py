"""What a terminal gets of text that strangers wrote."""

from __future__ import annotations

import ast
import io
import json
import logging

import pytest

from llava_core.cli import console
from llava_core.cli.console import say, show, table, visible
from tests.support.hostile_text import ATTACKS, VILE, assert_harmless
from tests.support.paths import ROOT


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_visible_and_nothing_else_changes(attack: str) -> None:
    shown = visible(f"红色 {attack}à\u00a0\u3000🧑\u200d🚀")
    assert_harmless(shown)
    assert shown.startswith("红色 \\")
    assert shown.endswith("à\u00a0\u3000🧑\u200d🚀")
    assert visible(shown) == shown
    assert json.loads(visible(json.dumps(VILE, ensure_ascii=False))) == VILE


def test_what_is_shown_how() -> None:
    assert visible("a\x1b[31m\x07\r\n\t\x7f\x85\x9b\u202e\u2066") == (
        r"a\u001b[31m\u0007\r\n\t\u007f\u0085\u009b\u202e\u2066"
    )
    assert visible("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_are_exact_in_a_pipe_and_visible_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((io.StringIO(), "a\x1b\tb\n"), (Screen(), "a\\u001b\tb\n")):
        monkeypatch.setattr("sys.stdout", stream)
        show("a\x1b\tb")
        assert stream.getvalue() == expected


def test_a_log_line_and_a_table_s_cell_stay_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nerror: forged")
    assert capsys.readouterr().err == "a\\nerror: forged\n"
    lines = table([(VILE, 1), ("b", 22)], (f"name{VILE}", "n")).split("\n")
    assert len(lines) == 4
    assert len({console.width(line) for line in lines}) == 1
    for line in lines:
        assert_harmless(line)


def test_what_a_library_logs_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.excepthook", None)
    before = logging.getLogRecordFactory()
    console.guard_terminal()
    try:
        record = logging.getLogger("anybody").makeRecord("anybody", 30, "", 0, "no %s", (VILE,), None)
    finally:
        logging.setLogRecordFactory(before)
    assert_harmless(record.getMessage())


def test_nothing_is_printed_past_it() -> None:
    """`show` and `say` are the only ways out; Terminal adds colours of its own."""
    owners = {"llava_core/cli/console.py", "llava_core/cli/terminal.py"}
    for name in ("llava_core", "extract", "train", "infer", "llava_align"):
        for path in (ROOT / name).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            if where in owners:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                past = ("print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exception")
                assert called not in past, f"{where}:{node.lineno}"  # type: ignore[attr-defined]
