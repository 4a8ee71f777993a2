"""Who may import whom (DESIGN, Layout): read from the source, so that lazy imports count as well."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from llava_align.doctor.command import OPTIONAL
from tests.support.paths import ROOT

PHASES = ("extract", "train", "infer")
SHIPPED = [
    ROOT / "llava_align/hub/modeling_llava_align.py",
    ROOT / "llava_align/hub/processing_llava_align.py",
]
"""Copied into exported folders, where this project is not."""
SOURCES = [
    path
    for name in ("llava_core", *PHASES, "llava_align")
    for path in sorted((ROOT / name).rglob("*.py"))
    if path not in SHIPPED
]


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path: Path) -> set[str]:
    """Every module that the file imports, at any depth, with its parents: {'a', 'a.b'}."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names | {name.rsplit(".", n)[0] for name in names for n in range(1, name.count(".") + 1)}


def imported_at_once(path: Path) -> set[str]:
    """Top-level packages that the file imports when it is imported, not when a function is called."""
    todo, names = [parsed(path)], set[str]()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return names


def importers(module: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in SOURCES if module in imported(path)}


@pytest.mark.parametrize("phase", PHASES)
def test_phases_import_only_the_core(phase: str) -> None:
    others = {*PHASES, "llava_align"} - {phase}
    for path in (ROOT / phase).rglob("*.py"):
        assert not imported(path) & others, path


def test_core_imports_none_of_its_siblings() -> None:
    for path in (ROOT / "llava_core").rglob("*.py"):
        assert not imported(path) & {*PHASES, "llava_align"}, path


def test_what_is_exported_needs_nothing_of_ours() -> None:
    for path in SHIPPED:
        assert not imported(path) & {*PHASES, "llava_align", "llava_core"}, path
        assert not importers(f"llava_align.hub.{path.stem}"), path


def reachable(start: Path) -> set[str]:
    """Modules of ours, and what they import, reachable from `start` through imports at any depth."""
    todo, seen = [start], set[str]()
    while todo:
        for name in imported(todo.pop()) - seen:
            seen.add(name)
            for path in (
                ROOT / (name.replace(".", "/") + ".py"),
                ROOT / name.replace(".", "/") / "__init__.py",
            ):
                if path.exists():
                    todo.append(path)
    return seen


def test_train_never_reaches_the_vision_tower_pillow_or_aiohttp() -> None:
    for path in (ROOT / "train").rglob("*.py"):
        reached = reachable(path)
        assert not reached & {"PIL", "aiohttp"}, path
        assert not [name for name in reached if name.startswith("llava_core.vision.")], path


def test_one_module_owns_h5py() -> None:
    assert importers("h5py") == {"llava_core/shards/hdf5_file.py"}


def test_one_module_owns_the_http_client() -> None:
    clients = {
        str(p.relative_to(ROOT))
        for p in SOURCES
        if "aiohttp" in imported(p) and "ClientSession" in p.read_text()
    }
    assert clients == {"llava_core/network/fetch.py"}


def test_one_module_calls_the_chat_template() -> None:
    callers = {
        str(p.relative_to(ROOT)) for p in SOURCES if "apply_chat_template(" in p.read_text(encoding="utf-8")
    }
    assert callers == {"llava_core/language/prompt_and_labels.py"}


def test_one_module_decodes_images() -> None:
    opens = {str(p.relative_to(ROOT)) for p in SOURCES if "Image.open(" in p.read_text(encoding="utf-8")}
    assert opens == {"llava_core/vision/preprocess.py"}


def test_packages_that_one_command_alone_needs_are_imported_where_it_uses_them() -> None:
    assert [*OPTIONAL.values()] == ["modelscope", "wandb"]
    for path in SOURCES:
        assert not imported_at_once(path) & {*OPTIONAL.values()}, path


def test_no_extra_repeats_what_all_commands_share() -> None:
    tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shared = {Requirement(line).name for line in project["dependencies"]}
    assert {*OPTIONAL.values()} <= shared
    for extra, lines in project["optional-dependencies"].items():
        assert not shared & {Requirement(line).name for line in lines}, extra
