"""A projector belongs to an encoder, a language model, its tokenizer and its template; never to a path."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava_core.conversation import Conversation
from llava_core.language import load_language_model
from tests.e2e.commands import Ended, call
from tests.small_models import QWEN3_TEMPLATE, write_language_model
from tests.small_runs import config, weights, write_runs
from tests.small_world import World, write_world
from train.report import WeightsAndBiases
from train.run import run as train_run

OLD = Path(__file__).parents[1] / "golden/version_1"
MODELS = Path(__file__).parents[2] / "llava/world/models"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a language model, and a run of 10 of its 24 steps."""
    root = write_runs(tmp_path_factory.mktemp("runs"))
    train_run(config(root, root / "run", max_steps=10))
    return root


def another_template(llm: Path) -> None:
    path = llm / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>user\n", "<|im_start|>human\n"))


def rotated_ids(llm: Path) -> None:
    """The same tokens with other numbers."""
    path = llm / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    plain = [token for token in vocabulary if not token.startswith("<")]
    numbers = [vocabulary[token] for token in plain]
    vocabulary.update(zip(plain, numbers[1:] + numbers[:1], strict=True))
    path.write_text(json.dumps(content))


def other_scaling(llm: Path) -> None:
    path = llm / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "num_key_value_heads": 2, "rms_norm_eps": 0.1}))


def fewer_blocks(llm: Path) -> None:
    """The weights of the others are then passed over."""
    path = llm / "config.json"
    content = json.loads(path.read_text())
    content.pop("layer_types", None)
    path.write_text(json.dumps({**content, "num_hidden_layers": 1}))


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (another_template, "token 1 of a fixed dialogue through the chat template: "),
    (rotated_ids, "of a fixed dialogue through the chat template: "),
    (other_scaling, "rms_norm_eps: "),
    (fewer_blocks, "num_hidden_layers: 2 vs 1"),
]


def changed(llm: Path, to: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(llm, to)
    change(to)
    return to


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_same_weights_beside_another_tokenizer_or_template_are_refused(
    world: World, begun: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    llm = changed(world.llm, tmp_path / "llm", change)
    models = ("--checkpoint", world.checkpoint, "--vision", world.vision, "--llm", llm, "--device", "cpu")
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": str(world.images[0])}) + "\n")
    refused = [
        call("infer", "ask", *models, "--image", world.images[0], code=1),
        call("infer", "batch", *models, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "o", code=1),
        call("infer", "lens", *models, "--image", world.images[0], "--out", tmp_path / "lens", code=1),
        call("llava", "export", *models[:-2], "--out", tmp_path / "export", code=1),
    ]
    trained = changed(begun / "llm", tmp_path / "trained", change)
    held_out, checkpoint = ("--features", begun / "held-out", "--device", "cpu"), begun / "run/last"
    refused.append(call("train", "eval", "--checkpoint", checkpoint, *held_out, "--llm", trained, code=1))
    shutil.copytree(begun / "run", tmp_path / "run", symlinks=True)
    refused.append(goes_on(begun, tmp_path / "run", llm=trained, code=1))
    for ended in refused:
        assert "another language model, tokenizer or chat template; expected" in ended.one_line()
        assert told in ended.one_line()


def goes_on(root: Path, out: Path, code: int = 0, **folders: Any) -> Ended:
    """`train run --resume` of the run that `begun` began."""
    given = {
        "features": root / "features",
        "eval-features": root / "held-out",
        "llm": root / "llm",
        **folders,
    }
    named = [part for flag, folder in given.items() for part in (f"--{flag}", folder)]
    flags = ("--batch-size", 4, "--epochs", 2, "--lr", 0.02, "--eval-every", 10, "--save-every", 10,
             "--log-every", 1, "--max-steps", 10, "--device", "cpu", "--resume")  # fmt: skip
    return call("train", "run", *named, "--out", out, *flags, code=code)


def test_a_run_goes_on_where_its_folders_have_moved(tmp_path: Path) -> None:
    """Absolute for relative, or another mount; other rows by the old name are another thing."""
    root = write_runs(tmp_path / "here")
    train_run(config(root, root / "whole", max_steps=10))
    train_run(config(root, root / "run", max_steps=10))
    for name in ("step-00000010", "summary.json"):  # as if it had been killed before its end
        path = root / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "run/last").unlink()
    (root / "run/best").unlink(missing_ok=True)
    train_run(config(root, root / "again", max_steps=10))
    (tmp_path / "there").mkdir()
    moved: dict[str, Any] = {}
    for flag, name in (("features", "features"), ("eval-features", "held-out"), ("llm", "llm")):
        moved[flag] = Path(shutil.copytree(root / name, tmp_path / "there" / f"{name}-2"))
    goes_on(root, root / "again", **moved)
    expected, got = weights(root / "whole"), weights(root / "again")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    others = {**moved, "features": moved["eval-features"]}
    (root / "again/summary.json").unlink()
    assert (
        "has changed" in (line := goes_on(root, root / "again", code=1, **others).one_line())
        or "rows" in line
    )


def test_todays_date_does_not_reach_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = QWEN3_TEMPLATE.replace(
        "{%- set ns", "{{- 'Today is ' + strftime_now('%d %B %Y') + '\n' }}\n{%- set ns", 1
    )
    llm = load_language_model(write_language_model(tmp_path / "llm", template=dated))
    text = llm.tokenizer.decode(
        Conversation(llm.tokenizer, llm.eos_ids).prompt([{"role": "user", "content": "a"}])
    )
    assert "Today is 26 July 2024" in text


def test_a_checkpoint_of_version_1_says_what_could_not_be_compared() -> None:
    ended = call(
        *("train", "eval", "--checkpoint", OLD / "checkpoint", "--features", OLD / "held-out"),
        *("--llm", MODELS / "llm", "--device", "cpu"),
    )
    (line,) = (line for line in ended.err.splitlines() if "was recorded without" in line)
    assert "settings of its config.json, embedding scale, chat template, vocabulary" in line


def test_a_stage_2_file_is_compared_with_the_models_given(world: World, tmp_path: Path) -> None:
    """The course's: `llm.*` beside `projection.*`."""
    llm = load_language_model(world.llm).model.state_dict()
    projection = {
        f"projection.{name}": value
        for name, value in load_file(world.checkpoint / "model.safetensors").items()
    }
    whole = {**projection, **{f"llm.{name}": value for name, value in llm.items()}}
    flags = ("--vision", world.vision, "--llm", world.llm)
    torch.save(whole, tmp_path / "frozen.pt")
    call("llava", "import", "--file", tmp_path / "frozen.pt", *flags, "--out", tmp_path / "frozen")
    name = next(name for name in llm if name.endswith("q_proj.weight"))
    torch.save({**whole, f"llm.{name}": llm[name] + 0.01}, tmp_path / "stage2_1.pt")
    ended = call(
        *("llava", "import", "--file", tmp_path / "stage2_1.pt", *flags, "--out", tmp_path / "trained"),
        code=1,
    )
    assert "other weights than the language model in" in ended.one_line()
    assert not (tmp_path / "trained").exists()


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []

    def init(**options: Any) -> object:
        begun.append(options)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    fake = types.SimpleNamespace(init=init, Table=None, errors=types.SimpleNamespace(Error=RuntimeError))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for _ in range(2):  # the second as after a kill: nothing was closed
        WeightsAndBiases(tmp_path, {}, "run")
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[1]["resume"] == "allow"
    (tmp_path / "other").mkdir()
    WeightsAndBiases(tmp_path / "other", {}, "run")
    assert begun[2]["id"] != begun[0]["id"]
