"""Instructions follow the captions' language; the checkpoint is asked by default what it was trained with."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from llava_core.language.instructions import CHINESE, ENGLISH, default_question, instructions_for
from llava_core.projector.checkpoint import load_checkpoint, point_to
from llava_core.shards.folder import open_shards
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import Ended, call
from tests.support.llava_server import llava_server
from tests.support.runs import edited, weights
from train.data.samples import Samples

CAPTIONS = {
    "en": (
        "A red circle.",
        "Two blue squares, one above the other.",
        "A sign that reads 欢迎 over a green door.",
    ),
    "zh": ("红色的圆形。", "两个蓝色方块，一上一下。", "绿色的门上有 WELCOME 的牌子。"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Models, and features of the same pictures with captions in English, in Chinese and in both."""
    world = write_aligned(tmp_path_factory.mktemp("world"))
    root = world.llm.parent
    for language, captions in CAPTIONS.items():
        for folder in (root / f"pictures-{language}", root / "pictures-both"):
            folder.mkdir(exist_ok=True)
            for number, (image, caption) in enumerate(zip(world.images, captions, strict=False)):
                name = f"{language}{number}"
                shutil.copy(image, folder / f"{name}.png")
                (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    for name in (*CAPTIONS, "both"):
        call("extract", "run", "--data", root / f"pictures-{name}", "--out", root / name,
             "--vision", world.vision, "--device", "cpu")  # fmt: skip
    return world


def train(world: Folders, features: str, out: Path, *flags: object, code: int = 0) -> Ended:
    given = ("--features", world.llm.parent / features, "--llm", world.llm, "--device", "cpu")
    small = ("--batch-size", 2, "--epochs", 2, "--save-every", 2, "--eval-captions", 0, "--keep", 9)
    held_out = ("--eval-features", world.llm.parent / features)
    return call("train", "run", *given, *held_out, *small, "--out", out, *flags, code=code)


def asked(world: Folders, checkpoint: Path) -> Any:
    models = ("--checkpoint", checkpoint, *world.flags[2:])
    return call("infer", "ask", *models, "--image", world.images[0], "--max-tokens", 4, "--json").summary


def texts_of(world: Folders, features: str, instructions: str) -> list[str]:
    """Questions that samples of one epoch are trained with, in the order of the rows."""
    chat = world.aligned().conversation
    samples = Samples(open_shards(world.llm.parent / features), chat, 64, 99, 0, instructions)
    texts = [chat.text(samples.example(index, epoch=0).ids) for index in range(len(samples))]
    known = {*CHINESE, *ENGLISH}
    return [next(one for one in sorted(known, key=len, reverse=True) if one in text) for text in texts]


def test_captions_answer_instructions_in_their_own_language(world: Folders) -> None:
    for instructions, own in (
        ("auto", {"en": ENGLISH, "zh": CHINESE}),
        ("en", {"en": ENGLISH, "zh": ENGLISH}),
    ):
        assert set(texts_of(world, "en", instructions)) <= set(own["en"])
        assert set(texts_of(world, "zh", instructions)) <= set(own["zh"])
    both = texts_of(world, "both", "auto")
    assert [question in CHINESE for question in both] == [False] * 3 + [True] * 3
    assert both == texts_of(world, "both", "auto")
    assert instructions_for("a\nb\n", "红") == ["a", "b"]
    assert default_question("auto", ["红", "a"]) == CHINESE[0]
    assert default_question("auto", ["123", "4", "a"]) == ENGLISH[0]  # no letter of either
    assert instructions_for("auto", "3 × 4 = 12!") == ENGLISH


@pytest.mark.parametrize(("features", "question"), [("en", ENGLISH[0]), ("zh", CHINESE[0])])
def test_a_checkpoint_is_asked_what_it_was_trained_with(
    world: Folders, tmp_path: Path, features: str, question: str
) -> None:
    train(world, features, tmp_path / "run", "--max-steps", 2)
    last = tmp_path / "run/last"
    assert json.loads((last / "config.json").read_text("utf-8"))["question"] == question
    assert question in (last / "README.md").read_text("utf-8")
    assert load_checkpoint(last).training["instructions"] == "auto"
    found = asked(world, last)
    assert found["prompt"] == question
    models = ("--checkpoint", last, *world.flags[2:], "--max-tokens", 4)
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(world.images[0])}) + "\n")
    files = ("--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl")
    call("infer", "batch", *models, *files)
    line = json.loads((tmp_path / "a.jsonl").read_text("utf-8"))
    assert (line["prompt"], line["answer"]) == (question, found["answer"])
    if features == "en":
        url = "data:image/png;base64," + base64.b64encode(world.images[0].read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}]
        with llava_server(*models) as served:
            body: Any = {"model": "run/last", "messages": [{"role": "user", "content": content}]}
            reply = requests.post(f"{served.base}/v1/chat/completions", json=body, timeout=60).json()
        assert reply["choices"][0]["message"]["content"].strip() == found["answer"]


def test_instructions_of_a_file_are_known_by_their_texts(world: Folders, tmp_path: Path) -> None:
    own, moved = tmp_path / "own.txt", tmp_path / "moved.txt"
    own.write_text("\ufeffWas ist zu sehen?\n\n  Beschreibe das Bild.\n", encoding="utf-8")
    train(world, "en", tmp_path / "run", "--instructions", own)
    assert asked(world, tmp_path / "run/last")["prompt"] == "Was ist zu sehen?"
    own.rename(moved)
    assert "nothing to do" in train(world, "en", tmp_path / "run", "--instructions", moved).err
    settings = ("-c", tmp_path / "run/training_config.yaml")
    assert "nothing to do" in call("train", "run", *settings).err
    moved.write_text("Was sonst?\n")
    line = train(world, "en", tmp_path / "run", "--instructions", moved, code=1).one_line()
    assert "holds a run with another --instructions" in line
    line = train(world, "en", tmp_path / "other", "--instructions", "fr", code=2).one_line()
    expected = "auto, zh, en, mixed, or a UTF-8 file with an instruction a line"
    assert line == f"error: --instructions; expected {expected}; got fr"


def test_a_run_that_is_older_than_the_choice_goes_on_as_it_began(world: Folders, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(world, "both", whole, "--instructions", "mixed")
    shutil.copytree(whole, killed, symlinks=True)
    point_to(killed / "last", killed / "step-00000002")
    for gone in ("summary.json", "best"):
        (killed / gone).unlink()
    for path in (killed / "training_config.yaml", killed / "step-00000002/training_config.yaml"):
        flags = yaml.safe_load(path.read_text("utf-8"))
        assert flags.pop("instructions") == "mixed"
        flags["out"] = str(killed)
        path.write_text(yaml.safe_dump(flags, allow_unicode=True), encoding="utf-8")
    edited(killed / "step-00000002")
    ended = train(world, "both", killed)
    assert f"{killed} began with --instructions mixed, and continues with them" in ended.err
    assert "continued at step 2" in ended.err
    for key, tensor in weights(whole).items():
        assert tensor.equal(weights(killed)[key])


def test_eval_asks_as_in_training_and_sweeps_vary_it(world: Folders, tmp_path: Path) -> None:
    trained = train(world, "both", tmp_path / "run", "--instructions", "en", "--json").summary
    models = ("--features", world.llm.parent / "both", "--llm", world.llm, "--device", "cpu")
    command = ("train", "eval", "--checkpoint", tmp_path / "run/last", *models, "--json")
    assert call(*command).summary["loss"] == pytest.approx(trained["eval_loss"], abs=1e-5)
    other = call(*command, "--instructions", "zh").summary["loss"]
    assert other != pytest.approx(trained["eval_loss"], abs=1e-5)
    assert call(*command, "--instructions", "fr", code=2).one_line().startswith("error: --instructions; ")
    sweep = ("train", "sweep", *models, "--eval-features", world.llm.parent / "both", "--batch-size", 2)
    planned = call(*sweep, "--out", tmp_path / "s", "--space", "instructions=zh,en", "--dry-run", "--json")
    assert planned.summary["trials"] == 2
