"""The documents cannot rot: lines, links, commands and examples in them are checked against the code."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import architecture
from extract.config import EncodeConfig
from llava_align.config import TraceConfig
from llava_align.demo import trace
from llava_core.cli.command import OUT_OF_MEMORY
from llava_core.cli.options import Command
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation, Turn
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from tests.support.language_models import LLAMA_TEMPLATE, write_language_model
from tests.support.messages import SPEAKERS
from tests.support.paths import ROOT
from tests.support.shards import write_shard
from train.config import RunConfig
from train.data.feature_cache import pick_residence
from train.recipes import RECIPES
from train.run_folder import RunFolder

PAGES = [*sorted(ROOT.glob("docs/**/*.md")), *ROOT.glob("README*.md"), ROOT / "features/README.md"]
PACKAGES = ("extract", "train", "infer", "llava_align", "llava_core")
SAME_CODE = (
    *("one-sample", "cache", "troubleshooting", "curves", "python-api", "extending"),
    *("transformers", "llama-cpp", "ollama", "clients"),
)
"""Pages whose code blocks are alike in both languages."""
LITERAL = 8
"""Least letters that are fixed in a template, so that none fits every line."""


def page(name: str) -> str:
    (found,) = ROOT.glob(f"docs/**/{name}")
    return found.read_text(encoding="utf-8")


def fenced(text: str, kind: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in blocks if re.fullmatch(kind, found)]


@functools.cache
def templates() -> tuple[re.Pattern[str], ...]:
    """What `say`, `show`, LlavaError, `require_same` and SPEAKERS of our packages can print, as patterns."""
    found = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in SPEAKERS:
                returns = [part.value for part in ast.walk(node) if isinstance(part, ast.Return)]
                found += [_pattern(value) for value in returns if value]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                if node.func.id == "LlavaError":
                    found.append(_error(node))
                elif node.func.id in ("say", "show"):
                    found.append(_pattern(node.args[0]))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args[1:]:
                if node.func.attr == "require_same":
                    found.append(_error(node))
    return tuple(re.compile(pattern, re.DOTALL) for pattern, own in found if own >= LITERAL)


def _error(node: ast.Call) -> tuple[str, int]:
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    pattern, own = _pattern(node.args[-1])
    if isinstance(node.func, ast.Attribute):
        pattern += "; expected .*; got .*"
    for key, word in (("expected", "expected "), ("got", "got "), ("do", "")):
        if key in named:
            part, more = _pattern(named[key])
            sure = isinstance(named[key], (ast.Constant, ast.JoinedStr))  # what is computed may be None
            pattern += f"(?:; {word}{part})" + ("" if sure else "?")
            own += more if sure else 0
    return pattern, own


def _pattern(node: ast.expr) -> tuple[str, int]:
    """A pattern of what a string expression gives, and how many of its letters are fixed."""
    if isinstance(node, ast.Constant):
        text = str(node.value).strip("\n")
        return re.escape(text), sum(map(str.isalpha, text))
    if isinstance(node, (ast.JoinedStr, ast.BinOp)):
        inner = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
        parts = [_pattern(part) for part in inner]
        return "".join(pattern for pattern, _ in parts), sum(own for _, own in parts)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "translated":
        return _pattern(node.args[0])
    if isinstance(node, ast.IfExp):
        (one, few), (other, many) = _pattern(node.body), _pattern(node.orelse)
        return f"(?:{one}|{other})", min(few, many)
    return ".*", 0


def said(line: str) -> bool:
    return any(pattern.fullmatch(line) for pattern in templates())


def test_only_what_is_printed_counts_as_said() -> None:
    assert said("the network gave no answer for 600 s; run the same command again when it does; "
                "--patience 0 marks such rows as failed")  # fmt: skip
    assert not said("the network gave no answer for 600 s; wait for it")
    assert not said("something that nobody prints")


@pytest.mark.parametrize("name", ["troubleshooting.md", "one-sample.md"])
def test_every_quoted_line_is_one_that_the_code_prints(name: str) -> None:
    lines = [line for block in fenced(page(name), "text") for line in block.splitlines()]
    if name == "one-sample.md":  # its tables: see below
        lines = [line for line in lines if line.startswith("loss ")]
    assert len(lines) > 2
    lines = [line for line in lines if "No space left on device" not in line]  # the system's
    unknown = [line for line in lines if not said(line) and not said(line.removeprefix("error: "))]
    assert not unknown


def test_the_traced_sample_is_the_one_shown() -> None:
    traced = trace.run(TraceConfig(device="cpu"))
    for name in ("one-sample.md", "one-sample.zh-CN.md"):
        text = " ".join(page(name).split())
        for stage in traced["stages"]:
            assert " ".join(f"{stage['name']} {stage['shape']} {stage['dtype']}".split()) in text
        for token in traced["tokens"]:
            assert f"{token['position']} {token['id']} {token['token'].strip()} " in text
        assert f"= {traced['loss']:.4f}" in text


def messages(tmp_path: Path) -> dict[str, str]:
    """Errors of the page that are cheap to provoke, by their first words there."""
    found = {}

    def provoke(first: str) -> contextlib.AbstractContextManager[None]:
        @contextlib.contextmanager
        def catch():  # type: ignore[no-untyped-def]
            with pytest.raises(LlavaError) as caught:
                yield
            found[first] = str(caught.value)

        return catch()

    endless = load_language_model(write_language_model(tmp_path / "llm", template=LLAMA_TEMPLATE))
    with provoke("the chat template closes an answer without an end token"):
        Conversation(endless.tokenizer, frozenset({0})).example([Turn("a", "b")], 9)
    with provoke("the tokenizer in"):
        load_language_model(write_language_model(tmp_path / "base", template=None))
    with provoke("--resident ram"):
        import torch

        pick_residence("ram", 1 << 60, torch.device("cpu"))
    shards = tmp_path / "shards"
    write_shard(shards / "a.h5")
    Shard(shards / "a.h5")
    (shards / "a.h5").rename(shards / "a.h5.part")
    with provoke("no finished shard"):
        open_shards(shards)
    with provoke("no run to resume"):
        out = tmp_path / "run"
        RunFolder(out, RunConfig(features=shards, llm=tmp_path, out=out, resume=True))
    return found


def test_cheap_errors_are_provoked(tmp_path: Path) -> None:
    text = page("troubleshooting.md")
    for first, message in messages(tmp_path).items():
        assert message.startswith(first)
        assert said(message), message  # the patterns hold for what really comes
        assert first in text, first


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} → {target}"
        if anchor:
            assert anchor in anchors(file), f"{path.name} → {target}"


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_have_these_flags(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in fenced(text, "(?:bash|)") for line in block.splitlines()]
    for line in [*lines, *re.findall(r"`(python -m [^`]+)`", text)]:
        found = re.search(
            r"(?:python -m|torchrun .*?-m) (extract|train|infer|llava_align) (.+)", line.split("  #")[0]
        )
        if not found or not found[2][0].isalpha():
            continue
        commands = importlib.import_module(f"{found[1]}.__main__").COMMANDS
        name, *words = shlex.split(found[2], comments=True)
        assert name in commands, line
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        unknown = flags - known_flags(commands[name])
        assert not unknown, line


def known_flags(command: Command) -> set[str]:
    names = [name.replace("_", "-") for name in command.config.__dataclass_fields__]
    return {f"--{prefix}{name}" for name in names for prefix in ("", "no-")} | {"--recipe", "--help"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/**/*.zh-CN.md")), ids=lambda path: path.name)
def test_both_languages_have_the_same_parts(path: Path) -> None:
    english, chinese = (
        file.read_text(encoding="utf-8") for file in (path.with_name(path.name.replace(".zh-CN", "")), path)
    )
    for part in (r"^#+ ", r"^```", r"^\| ", r"^!\["):
        counts = [len(re.findall(part, text, re.MULTILINE)) for text in (english, chinese)]
        assert counts[0] == counts[1], f"{path.name}: {part}"
    if path.name.split(".")[0] in SAME_CODE:
        code = [re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE) for text in (english, chinese)]
        assert code[0] == code[1]
        assert issues(english) == issues(chinese)


def issues(text: str) -> set[str]:
    return set(re.findall(r"[\w.-]+/[\w.-]+#\d+", text))


@pytest.mark.parametrize("name", ["cache.md", "cache.zh-CN.md"])
def test_the_six_lines_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(write_shard(tmp_path / "features/train/train-00000.h5", failed=[0]))
    monkeypatch.chdir(tmp_path)
    (example,) = fenced(page(name), "python")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(example, {})
    assert out.getvalue() == f"({shard.tokens}, {shard.width}) {shard.caption(1)}\n"


@pytest.mark.parametrize("name", architecture.FILES)
def test_pictures_of_the_architecture_are_those_of_the_script(name: str) -> None:
    drawn = architecture.drawn(architecture.FILES[name])
    assert (ROOT / "docs/images" / name).read_text(encoding="utf-8") == drawn
    for part in ("[197, 768]", "768 → 1024", f"{768 * 1024 + 1024:,}", "[197, 1024]"):
        assert part in drawn


def test_sizes_are_those_of_the_reference() -> None:
    assert f"{197 * 768 * 2:,} bytes" in page("cache.md")
    assert f"{197 * 768 + 2 * 768:,} bytes" in page("cache.md")
    assert f"{768 * 1024 + 1024:,} weights" in page("one-sample.md")
    assert f"over --max-failed {EncodeConfig.max_failed:g}" in page("troubleshooting.md")
    assert OUT_OF_MEMORY in page("troubleshooting.md")


@pytest.mark.parametrize("name", ["from-the-course.md", "from-the-course.zh-CN.md"])
def test_the_course_page_has_every_flag_of_the_courses_recipes(name: str) -> None:
    shown = page(name)
    for recipe in ("course", "course-stage2"):
        for flag, value in RECIPES[recipe].items():
            assert f"--{flag.replace('_', '-')} {value}" in shown
