"""Forced choice: `AlignedModel` from Python, and `infer rank`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from infer.answerer import open_image_answerer
from infer.config import AskConfig
from llava_align import AlignedModel, FeatureDataset, LlavaError
from llava_core.language import forced_choice
from llava_core.language.instructions import QUESTION
from llava_core.language.prompt_and_labels import Turn
from llava_core.language.target_logits import target_logits
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call
from tests.support.features import CAPTIONS, write_features

TEXTS = ["红色的圆", "蓝色的圆形在左边。", "a", "b c d e f"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    world = write_aligned(tmp_path_factory.mktemp("rank"))
    write_features(world, world.llm.parent / "features/a.h5")
    return world


@pytest.fixture(scope="module")
def model(world: Folders) -> AlignedModel:
    return AlignedModel.load(world.checkpoint, vision=str(world.vision), llm=world.llm, device="cpu")


def test_it_answers_as_the_command_does_whatever_an_image_comes_as(
    world: Folders, model: AlignedModel
) -> None:
    flags = (*world.flags, "--image", world.images[0], "--prompt", "What?", "--max-tokens", 6, "--json")
    answer = call("infer", "ask", *flags).summary["answer"]
    image = Image.open(world.images[0])
    for form in (str(world.images[0]), world.images[0], image, np.asarray(image.convert("RGB"))):
        assert model.answer(form, "What?", max_tokens=6) == answer
    assert "".join(model.answer(image, "What?", stream=True, max_tokens=6)).strip() == answer
    features = FeatureDataset(world.llm.parent / "features")[0]
    cached = AlignedModel.load(world.checkpoint, llm=world.llm, device="cpu")
    assert cached.answer(features, "What?", max_tokens=6) == answer
    assert cached.answer(features.features, "What?", max_tokens=6) == answer
    with pytest.raises(
        LlavaError, match="this model was loaded without an encoder; load the model with vision"
    ):
        cached.answer(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "I;16B"])
def test_a_pil_image_of_any_mode_is_seen_as_in_a_file(
    world: Folders, model: AlignedModel, tmp_path: Path, mode: str
) -> None:
    image = Image.open(world.images[0]).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode.startswith("I"):
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        given = Image.fromarray(grey if mode == "I;16" else grey.astype(">u2"))
        Image.fromarray(grey).save(tmp_path / "a.png")
    else:
        given = image.convert("LA" if mode == "PA" else mode).convert(mode)
        given.convert("RGBA" if given.has_transparency_data else "RGB").save(tmp_path / "a.png")
    assert given.mode == mode
    assert torch.equal(model.visual_tokens(given), model.visual_tokens(tmp_path / "a.png"))


def test_what_is_no_image_is_refused_and_no_number_is_made_of_it(model: AlignedModel, world: Folders) -> None:
    features = FeatureDataset(world.llm.parent / "features")[0].features
    assert torch.equal(model.visual_tokens(features.numpy()), model.visual_tokens(features))
    row = FeatureDataset(world.llm.parent / "features")[0]._replace(fingerprint="0" * 64)
    with pytest.raises(LlavaError, match=r"features of another encoder; expected .*; got 000"):
        model.answer(row)
    bad = features.clone()
    bad[1, 1] = torch.nan
    for given, message in (
        (bad, "features of an image; expected finite floating-point numbers"),
        (features.int(), "expected finite floating-point numbers"),
        (features[None], "features of an image; expected a tensor"),
        (np.zeros((0, 4, 3), np.uint8), r"expected uint8 \[height, width, 3\]; got uint8 \[0, 4, 3\]"),
        (Image.new("RGB", (0, 3)), "an image; expected some pixels; got 0×3"),
        (Image.new("F", (3, 3)), "expected 8 or 16 bits a channel; got mode F; scale it to 0"),
        (None, "an image; expected a path, an address, a PIL image, an array or features; got NoneType"),
    ):
        with pytest.raises(LlavaError, match=message):
            model.visual_tokens(given)  # type: ignore[arg-type]


def test_a_chat_keeps_its_turns(world: Folders, model: AlignedModel) -> None:
    chat = model.chat(world.images[0], max_tokens=4)
    first = chat.ask("What?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == first == model.answer(world.images[0], "What?", max_tokens=4)
    "".join(chat.ask("And?", stream=True))
    assert len(chat.messages) == 4
    assert isinstance(model.chat(max_tokens=4).ask("Hello"), str)


@pytest.mark.parametrize("limit", [1 << 27, 1])
def test_losses_are_those_of_each_text_alone(
    world: Folders, model: AlignedModel, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded together, or one by one."""
    monkeypatch.setattr(forced_choice, "CHUNK_LOGITS", limit)
    images = ("",)
    aligned = open_image_answerer(
        AskConfig(checkpoint=world.checkpoint, vision=world.vision, llm=world.llm, image=images, device="cpu")
    )
    visual = aligned.encode_files([world.images[0].read_bytes()])[0]
    expected = {}
    for text in TEXTS:
        example = aligned.conversation.example([Turn(QUESTION, text)], max_answer_tokens=1 << 30)
        logits, targets = target_logits(aligned.llm, visual, example)
        expected[text] = F.cross_entropy(logits, targets, reduction="none")
    choices = model.rank(world.images[0], TEXTS)
    assert [choice.text for choice in choices] == sorted(TEXTS, key=lambda text: expected[text].mean())
    for choice in choices:
        assert choice.loss == pytest.approx(float(expected[choice.text].mean()), rel=1e-4)
        assert choice.log_probability == pytest.approx(-float(expected[choice.text].sum()), rel=1e-4)
        assert choice.text == TEXTS[choice.index]
    by_sum = model.rank(world.images[0], TEXTS, normalise=False)
    assert [choice.text for choice in by_sum] == sorted(TEXTS, key=lambda text: expected[text].sum())
    assert model.loss(world.images[0], TEXTS[1]) == pytest.approx(float(expected[TEXTS[1]].mean()), rel=1e-4)


def test_what_is_no_image_or_no_list_is_refused(world: Folders, model: AlignedModel, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(LlavaError, match=r"cannot read .*no\.png as an image"):
        model.answer(tmp_path / "no.png")
    with pytest.raises(LlavaError, match=r"expected uint8 \[height, width, 3\]; got float32 \[4, 4, 3\]"):
        model.answer(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(LlavaError, match=r"features of an image; expected a tensor \(5, 64\)"):
        model.answer(torch.zeros(3, 12))
    with pytest.raises(LlavaError, match="rank; expected a list of texts; got 'red'"):
        model.rank(world.images[0], "red")
    with pytest.raises(LlavaError, match=r"rank; expected a list of texts; got \['red', None\]"):
        model.rank(torch.zeros(5, 64), ["red", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="temprature"):
        model.answer(world.images[0], temprature=1)
    with pytest.raises(LlavaError, match="temperature; expected 0 to 100"):
        model.answer(world.images[0], temperature=-1)


def test_a_file_of_questions_is_ranked_and_goes_on(
    world: Folders, tmp_path: Path, model: AlignedModel
) -> None:
    source, output = world.images[0].parent / "choices.jsonl", tmp_path / "ranked.jsonl"
    best = model.rank(world.images[0], TEXTS, "?")[0]
    lines = [
        {"image": world.images[0].name, "prompt": "?", "texts": TEXTS, "answer": best.text, "own": 1},
        {"image": world.images[0].name, "prompt": "?", "texts": TEXTS, "answer": (best.index + 1) % 4},
        {"image": "gone.png", "texts": TEXTS},
        {"image": world.images[1].name, "texts": TEXTS},
    ]
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    command = ("infer", "rank", *world.flags, "--input", source, "--output", output, "--json")
    summary = call(*command, code=1).summary  # one has no ranking
    assert {key: summary[key] for key in ("lines", "failed", "judged", "accuracy", "chance")} == {
        "lines": 4, "failed": 1, "judged": 2, "accuracy": 0.5, "chance": 0.25
    }  # fmt: skip
    written = output.read_text(encoding="utf-8")
    first, second, gone, unjudged = map(json.loads, written.splitlines())
    assert (first["choice"], first["correct"], first["own"]) == (best.text, True, 1)
    assert first["ranking"][0] == best.index
    assert first["losses"][best.index] == pytest.approx(best.loss, rel=1e-4)
    assert second["correct"] is False
    assert "no image file" in gone["error"]
    assert "correct" not in unjudged
    output.write_text(written[: written.index("\n") + 20], encoding="utf-8")  # torn
    assert call(*command, code=1).summary == summary
    again = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    for line, before in zip(again, map(json.loads, written.splitlines()), strict=True):
        assert line.pop("losses", []) == pytest.approx(before.pop("losses", []), rel=1e-4)
        assert line == before


def test_rows_of_shards_are_ranked_among_captions_of_other_images(world: Folders, tmp_path: Path) -> None:
    flags = ("--checkpoint", world.checkpoint, "--llm", world.llm, "--device", "cpu")
    features = ("--features", world.llm.parent / "features")
    command = ("infer", "rank", *flags, *features, "--output", tmp_path / "r.jsonl", "--json")
    summary = call(*command, "--choices", 3).summary
    assert (summary["lines"], summary["judged"], summary["chance"]) == (3, 3, pytest.approx(1 / 3))
    assert 0 <= summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"] <= 1
    for line in map(json.loads, (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()):
        assert len(set(line["texts"])) == 3
        assert line["answer"] == line["caption"] == CAPTIONS[line["row"]]
        assert line["correct"] == (line["choice"] == line["caption"])
    line = call(*command[:-3], "--output", tmp_path / "more.jsonl", code=1).one_line()
    assert "--choices 8; expected at most 3" in line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"image": "a.png"}, "line 1 of * has no texts to rank"),
        ({"image": "a.png", "texts": ["one"]}, "has no texts to rank"),
        ({"image": "a.png", "texts": ["a", "b"], "answer": "c"}, "`answer` in line 1"),
        (
            {"image": "a.png", "texts": ["a", "b"], "answer": 2},
            "expected one of its texts, or the number of one",
        ),
        ({"image": "a.png", "texts": ["a", "b"], "correct": True}, "has the key 'correct'; rename it"),
    ],
)
def test_lines_that_cannot_be_ranked(
    world: Folders, tmp_path: Path, line: dict[str, object], words: str
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    command = (
        "infer",
        "rank",
        *world.flags,
        "--input",
        tmp_path / "q.jsonl",
        "--output",
        tmp_path / "r.jsonl",
    )
    said = call(*command, code=1).one_line()
    for part in words.split(" * "):
        assert part in said
    assert not (tmp_path / "r.jsonl").exists()
