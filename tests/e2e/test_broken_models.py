"""Language models whose template or settings are broken, odd or hostile: one line, whatever they hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_core.language import prompt_and_labels as conversation
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import Ended, call

FAILS = "the chat template of {llm} fails; got "


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture
def llm(small: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.llm, tmp_path / "llm"))


def ask(small: Folders, llm: Path, code: int = 1) -> Ended:
    flags = ("--checkpoint", small.checkpoint, "--vision", small.vision, "--llm", llm, "--device", "cpu")
    return call("infer", "ask", *flags, "--image", small.images[0], "--max-tokens", 4, code=code)


@pytest.mark.parametrize(
    ("template", "got"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages | nothing }}", "TemplateAssertionError: No filter named 'nothing'"),
        ("{{ raise_exception('\x1b[31mno system\nrole') }}", "TemplateError: \\u001b[31mno system"),
        ("{{ messages[9].content }}", "UndefinedError: list object has no element 9"),
        ("{{ 1 + 'a' }}", "TypeError: unsupported operand"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
         "TimeoutError: it runs for more than 0.2 s"),
    ],
)  # fmt: skip
def test_a_template_that_fails_or_never_ends(
    small: Folders, llm: Path, template: str, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "RENDER_SECONDS", 0.2)
    (llm / "chat_template.jinja").write_text(template)
    assert FAILS.format(llm=llm) + got in ask(small, llm).one_line()


@pytest.mark.parametrize("value", [["</s>"], [2, "2"], "", 1.5, True, {"a": 1}, [[1]], float("nan")])
def test_end_tokens_that_are_no_numbers(small: Folders, llm: Path, value: object) -> None:
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    line = ask(small, llm).one_line()
    assert "eos_token_id" in line
    assert "expected the number of a token, or a list of them; got " in line


@pytest.mark.parametrize("value", [-1, 264, 2**70, [2, -5]])
def test_end_tokens_beyond_the_vocabulary_are_told(small: Folders, llm: Path, value: object) -> None:
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    odd = value[1] if isinstance(value, list) else value
    assert (
        f"eos_token_id {odd} ends no answer: there are 264 tokens, from 0 on" in ask(small, llm, code=0).err
    )


@pytest.mark.parametrize("value", [None, [], [None], 2])
def test_end_tokens_that_are_none_leave_the_tokenizers(small: Folders, llm: Path, value: object) -> None:
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert "eos" not in ask(small, llm, code=0).err


@pytest.mark.parametrize("content", ["{", "[]", "\udcff", "[" * 100_000])
def test_settings_that_transformers_would_leave_out_without_a_word(
    small: Folders, llm: Path, content: str
) -> None:
    path = llm / "generation_config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert f"damaged {path}" in ask(small, llm).one_line()
