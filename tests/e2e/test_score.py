"""From stored features and live images to answers, and from answers to scores."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer.ask import run as ask
from infer.batch import command as batch
from infer.config import AskConfig, BatchConfig, ScoreConfig
from infer.score import command as score
from llava_core.errors import LlavaError
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import ENVIRONMENT, call
from tests.support.features import models, write_features
from tests.support.paths import ROOT
from tests.support.shards import header, outcome, write_shard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The shard of its pictures lies in features/."""
    root = tmp_path_factory.mktemp("world")
    world = write_aligned(root)
    write_features(world, root / "features/part.h5")
    return world


@pytest.fixture(scope="module")
def features(world: Folders) -> Path:
    return world.vision.parent / "features"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_captions_of_a_shard_are_those_of_its_pictures(
    world: Folders, features: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stored.jsonl"
    flags = [*world.flags, "--max-tokens", 8, "--features", features, "--prompt", "看", "--output", out]
    vision = flags.index("--vision")
    del flags[vision : vision + 2]
    assert call("infer", "batch", *flags, "--batch-size", 3, "--json").summary["questions"] == 4
    lines = lines_of(out)
    assert [(line["shard"], line["row"], line.get("id")) for line in lines] == [
        ("part.h5", 0, None),
        ("part.h5", 2, "c"),
        ("part.h5", 3, "d"),
        ("part.h5", 4, "e"),
    ]
    assert [line.get("caption") for line in lines] == ["红色的圆", "红的", "a 圆 b", None]
    asked = ask(
        AskConfig(**models(world), image=tuple(str(world.images[k]) for k in (0, 2, 3, 4)), prompt="看")
    )
    assert [line["answer"] for line in lines] == [line["answer"] for line in asked["answers"]]
    assert len({line["answer"] for line in lines}) > 1

    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) * 2 // 3])
    del (stored := models(world))["vision"]
    config = BatchConfig(**stored, features=features, prompt="看", output=out)
    batch.run(config)
    assert out.read_bytes() == whole


def test_a_damaged_row_and_a_prompt_too_long_are_rows(world: Folders, features: Path, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    path = tmp_path / "features/part.h5"
    data = bytearray((features / "part.h5").read_bytes())
    layout = Shard(features / "part.h5").layout
    data[layout.offsets["features"] + 2 * layout.row_bytes] ^= 1
    path.write_bytes(data)
    del (blind := models(world))["vision"]
    batch.run(BatchConfig(**blind, features=path, output=tmp_path / "a.jsonl"))
    lines = lines_of(tmp_path / "a.jsonl")
    damaged = [line.get("error") for line in lines]
    assert damaged[0] is damaged[2] is damaged[3] is None
    assert str(damaged[1]).startswith(f"row 2 of {path} is damaged; `extract verify ")
    (tmp_path / "old.jsonl").write_text(json.dumps({**lines[1], "answer": "红"}))
    with pytest.raises(LlavaError, match=r"row 2 of .* is damaged"):
        score.run(ScoreConfig(input=tmp_path / "old.jsonl", vision=world.vision, features=path, device="cpu"))

    source = tmp_path / "q.jsonl"
    questions = [{"image": str(world.images[0]), "prompt": prompt} for prompt in ("长" * 400, "看")]
    source.write_text("\n".join(map(json.dumps, questions)))
    batch.run(BatchConfig(**models(world), input=source, output=tmp_path / "b.jsonl"))
    long, short = lines_of(tmp_path / "b.jsonl")
    assert "the question does not fit" in long["error"]
    assert "answer" in short
    with pytest.raises(LlavaError, match="either --input or --features"):
        BatchConfig(**models(world), input=source, features=path, output=tmp_path / "c.jsonl")
    with pytest.raises(LlavaError, match="--vision is missing"):
        BatchConfig(**blind, input=source, output=tmp_path / "c.jsonl")


def test_ask_about_several_images_one_of_them_on_standard_input(world: Folders) -> None:
    (world.vision.parent / "bad.png").write_text("text")
    words = [
        "--image",
        world.images[0],
        "--image",
        "-",
        "--image",
        world.vision.parent / "bad.png",
        "--prompt",
        "看",
    ]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "infer",
            "ask",
            *map(str, [*world.flags, "--max-tokens", 8, *words]),
            "--json",
        ],
        input=world.images[1].read_bytes(),
        capture_output=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 1, ended.stderr
    assert "bad.png as an image: not an image" in ended.stderr.decode()
    out = ended.stdout.decode()
    first, second, third = json.loads(out.splitlines()[-1])["answers"]
    assert out.startswith(f"{world.images[0]}: {first['answer']}")
    assert f"\n-: {second['answer']}" in out
    assert first["answer"] != second["answer"]
    assert set(third) == {"image", "error"}
    alone = ask(AskConfig(**models(world), image=(str(world.images[1]),), prompt="看"))
    assert (alone["image"], alone["answer"]) == (str(world.images[1]), second["answer"])
    assert alone["tokens"] > 0
    assert alone["prefilled"] > 5
    with pytest.raises(LlavaError, match="at most one -"):
        AskConfig(**models(world), image=("-",), prompt="-")


def test_scores_of_a_file(
    world: Folders, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures, and CLIPScore alike from live images, from features, and from the tower itself."""
    tower = open_vision_tower(world.vision, text=True)
    pixels = np.stack([tower.preprocess.decode_image(p.read_bytes()).pixels for p in world.images])
    answers = ["红色的圆", "圆", "红 b", "a", "b b"]
    cosines = (tower.encode_image_embedding(pixels) * tower.encode_text(answers)).sum(-1)
    lines: list[dict[str, Any]] = [
        {"image": path.name, "shard": "part.h5", "row": row, "answer": text, "references": [text, "蓝"]}
        for row, (path, text) in enumerate(zip(world.images, answers, strict=True))
    ]
    lines[1] = {"image": "no.png", "error": "no image file"}
    source = tmp_path / "answers.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    flags: dict[str, Any] = {"input": source, "reference": "references", "tokenizer": "char"}
    vision: dict[str, Any] = {"vision": world.vision, "device": "cpu"}
    figures = score.run(ScoreConfig(**flags, **vision, images=world.vision.parent))
    assert (figures["lines"], figures["unanswered"]) == (5, 1)
    assert figures["tokenizer"] == {"name": "char", "version": "1"}
    assert figures["bleu_1"] == pytest.approx(1)
    assert figures["rouge_l"] == pytest.approx(1)
    expected = 2.5 * float(cosines[[0, 2, 3, 4]].clamp(min=0).mean())
    assert figures["clipscore"] == pytest.approx(expected, abs=1e-5)
    assert figures["clipscore_of_captions"] == figures["clipscore"] != figures["clipscore_of_another_answer"]
    assert "tokenizer" in capsys.readouterr().out

    stored = score.run(ScoreConfig(**flags, **vision, features=features))
    assert stored["clipscore"] == pytest.approx(expected, abs=2e-3)
    alone = call("infer", "score", "--input", source, "--reference", "none", "--vision", world.vision,
                 "--device", "cpu", "--images", world.vision.parent, "--json")  # fmt: skip
    assert alone.summary["clipscore"] == figures["clipscore"]
    assert "bleu_1" not in alone.summary
    assert figures["clipscore_low"] < figures["clipscore"] < figures["clipscore_high"]

    # Two answers about each picture: the other answer is one about the other picture.
    twice = [lines[0], {**lines[0], "answer": "b"}, lines[2], {**lines[2], "answer": "a"}]
    source.write_text("\n".join(map(json.dumps, twice)))
    shown = tower.encode_image_embedding(pixels[[0, 0, 2, 2]])
    crossed = 2.5 * (shown * tower.encode_text(["红 b", "a", "红色的圆", "b"])).sum(-1).clamp(min=0).mean()
    paired = score.run(ScoreConfig(**flags, **vision, features=features))
    assert paired["clipscore_of_another_answer"] == pytest.approx(float(crossed), abs=2e-3)
    source.write_text("\n".join(map(json.dumps, twice[:2])))
    capsys.readouterr()
    alike = score.run(ScoreConfig(**flags, **vision, images=world.vision.parent))
    assert (alike["pictures"], alike["clipscore_of_another_answer"]) == (1, None)
    assert "all lines are about one image" in capsys.readouterr().err
    source.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(LlavaError, match=r"no reference under 'caption'.*got a line with image, shard"):
        score.run(ScoreConfig(input=source))
    with pytest.raises(LlavaError, match="some references are Chinese and some are not"):
        score.run(ScoreConfig(input=source, reference="references"))
    with pytest.raises(LlavaError, match="no text under 'reply'"):
        score.run(ScoreConfig(input=source, answer="reply"))


def test_features_that_no_clipscore_can_be_had_from(world: Folders, features: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"shard": "part.h5", "row": 99, "answer": "红"}))
    flags: dict[str, Any] = {"input": source, "vision": world.vision, "device": "cpu"}
    with pytest.raises(LlavaError, match="names no row of --features"):
        score.run(ScoreConfig(**flags, features=features))
    with pytest.raises(LlavaError, match="names no `image`"):
        score.run(ScoreConfig(**flags))
    with pytest.raises(LlavaError, match=r"another encoder; expected vision .* got random"):
        score.run(ScoreConfig(**flags, features=write_shard(tmp_path / "random.h5", rows=1)))
    layered = header(["红"])
    layered = dataclasses.replace(layered, encoder={**layered.encoder, "layer": 1})
    with ShardWriter(tmp_path / "layered.h5", layered) as writer:
        writer.write([outcome(0)])
        writer.finish()
    with pytest.raises(LlavaError, match="got those of layer 1"):
        score.run(ScoreConfig(**flags, features=tmp_path / "layered.h5"))
