"""From stored features and live images to answers, and from answers to scores."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infer import batch, score
from infer.ask import run as ask
from infer.config import AskConfig, BatchConfig, ScoreConfig
from llava_core.checkpoint import Provenance, save_checkpoint
from llava_core.errors import LlavaError
from llava_core.language import load_language_model
from llava_core.projector import build_projector, match_scale
from llava_core.shard_writer import RowRecord, ShardWriter
from llava_core.shards import Shard, ShardHeader
from llava_core.status import Status
from llava_core.vision import open_vision_tower
from tests.e2e.commands import ENVIRONMENT, ROOT, run
from tests.small_models import write_language_model
from tests.small_shards import header, outcome, write_shard
from tests.small_vision import write_vision_folder

CAPTIONS = ["红色的圆", "蓝色的圆", "红的", "a 圆 b", ""]


@dataclasses.dataclass(frozen=True)
class World:
    root: Path
    images: list[Path]

    @property
    def models(self) -> dict[str, Any]:
        folders = {"checkpoint": "run/last", "vision": "vision", "llm": "llm"}
        return {**{flag: self.root / folder for flag, folder in folders.items()}, "max_tokens": 8}

    @property
    def flags(self) -> list[object]:
        return [
            word for flag, value in self.models.items() for word in ("--" + flag.replace("_", "-"), value)
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Small random models, five pictures, and a shard of their features; the second is a dead link."""
    root = tmp_path_factory.mktemp("world")
    tower = open_vision_tower(write_vision_folder(root / "vision"))
    llm = load_language_model(write_language_model(root / "llm"))
    torch.manual_seed(0)
    projector = build_projector("linear", tower.width, llm.hidden)
    match_scale(projector, torch.randn(64, tower.width), 4 * llm.embedding_rms)
    provenance = Provenance(tower.fingerprint, tower.encoder, tower.preprocess.to_json(), llm.identity)
    save_checkpoint(root / "run/last", projector, provenance, {}, {}, {})
    images, records = [], []
    for row in range(5):
        pixels = np.random.default_rng(row).integers(0, 256, (3, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((40, 30)).save(buffer, "PNG")
        images.append(root / f"{row}.png")
        images[-1].write_bytes(buffer.getvalue())
        features = tower.encode(tower.preprocess.decode_image(buffer.getvalue()).pixels[None])[0]
        digest = hashlib.sha256(buffer.getvalue()).digest()
        record = RowRecord(row, Status.OK, features.numpy().astype("<f2"), 200, 1, 9, (30, 40), digest)
        records.append(RowRecord(row, Status.HTTP_4XX, http=404) if row == 1 else record)
    made = ShardHeader(
        encoder=tower.encoder,
        preprocess=tower.preprocess.to_json(),
        source={"name": "part.parquet", "rows": 5, "sha256": "1" * 64},
        tokens=tower.tokens,
        width=tower.width,
        captions=CAPTIONS,
        urls=[""] * 5,
        ids=["", "", "c", "d", "e"],
    )
    (root / "features").mkdir()
    with ShardWriter(root / "features/part.h5", made) as writer:
        writer.write(records)
        writer.finish()
    return World(root, images)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_captions_from_a_shard_are_those_of_its_pictures(world: World, tmp_path: Path) -> None:
    out = tmp_path / "stored.jsonl"
    flags = [*world.flags, "--features", world.root / "features", "--prompt", "看", "--output", out]
    vision = flags.index("--vision")
    del flags[vision : vision + 2]
    assert run("infer", "batch", *flags, "--batch-size", 3, "--json").summary["questions"] == 4
    lines = lines_of(out)
    assert [(line["shard"], line["row"], line.get("id")) for line in lines] == [
        ("part.h5", 0, None),
        ("part.h5", 2, "c"),
        ("part.h5", 3, "d"),
        ("part.h5", 4, "e"),
    ]
    assert [line.get("caption") for line in lines] == ["红色的圆", "红的", "a 圆 b", None]
    asked = ask(
        AskConfig(**world.models, image=tuple(str(world.images[k]) for k in (0, 2, 3, 4)), prompt="看")
    )
    assert [line["answer"] for line in lines] == [line["answer"] for line in asked["answers"]]
    assert len({line["answer"] for line in lines}) > 1

    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) * 2 // 3])
    del (stored := dict(world.models))["vision"]
    config = BatchConfig(**stored, features=world.root / "features", prompt="看", output=out)
    batch.run(config)
    assert out.read_bytes() == whole


def test_a_damaged_row_and_a_prompt_too_long_are_rows(world: World, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    path = tmp_path / "features/part.h5"
    data = bytearray((world.root / "features/part.h5").read_bytes())
    layout = Shard(world.root / "features/part.h5").layout
    data[layout.offsets["features"] + 2 * layout.row_bytes] ^= 1
    path.write_bytes(data)
    del (models := dict(world.models))["vision"]
    batch.run(BatchConfig(**models, features=path, output=tmp_path / "a.jsonl"))
    damaged = [line.get("error") for line in lines_of(tmp_path / "a.jsonl")]
    assert damaged == [None, f"row 2 of {path} is damaged; see `extract verify`", None, None]

    source = tmp_path / "q.jsonl"
    questions = [{"image": str(world.images[0]), "prompt": prompt} for prompt in ("长" * 400, "看")]
    source.write_text("\n".join(map(json.dumps, questions)))
    batch.run(BatchConfig(**world.models, input=source, output=tmp_path / "b.jsonl"))
    long, short = lines_of(tmp_path / "b.jsonl")
    assert "no longer fits" in long["error"]
    assert "answer" in short
    with pytest.raises(LlavaError, match="either --input or --features"):
        BatchConfig(**world.models, input=source, features=path, output=tmp_path / "c.jsonl")
    with pytest.raises(LlavaError, match="--vision is missing"):
        BatchConfig(**models, input=source, output=tmp_path / "c.jsonl")


def test_ask_about_several_images_one_of_them_on_standard_input(world: World) -> None:
    (world.root / "bad.png").write_text("text")
    words = ["--image", world.images[0], "--image", "-", "--image", world.root / "bad.png", "--prompt", "看"]
    ended = subprocess.run(
        [sys.executable, "-m", "infer", "ask", *map(str, [*world.flags, *words]), "--json"],
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
    alone = ask(AskConfig(**world.models, image=(str(world.images[1]),), prompt="看"))
    assert (alone["image"], alone["answer"]) == (str(world.images[1]), second["answer"])
    assert 0 < alone["seconds_to_first"] <= alone["seconds"]
    with pytest.raises(LlavaError, match="at most one -"):
        AskConfig(**world.models, image=("-",), prompt="-")


def test_scores_of_a_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures, and CLIPScore alike from live images, from features, and from the tower itself."""
    tower = open_vision_tower(world.root / "vision", text=True)
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
    vision: dict[str, Any] = {"vision": world.root / "vision", "device": "cpu"}
    figures = score.run(ScoreConfig(**flags, **vision, images=world.root))
    assert (figures["lines"], figures["unanswered"]) == (5, 1)
    assert figures["tokenizer"] == {"name": "char", "version": "1"}
    assert figures["bleu_1"] == pytest.approx(1)
    assert figures["rouge_l"] == pytest.approx(1)
    expected = 2.5 * float(cosines[[0, 2, 3, 4]].clamp(min=0).mean())
    assert figures["clipscore"] == pytest.approx(expected, abs=1e-5)
    assert figures["clipscore_of_captions"] == figures["clipscore"] != figures["clipscore_of_the_next_answer"]
    assert "tokenizer" in capsys.readouterr().out

    stored = score.run(ScoreConfig(**flags, **vision, features=world.root / "features"))
    assert stored["clipscore"] == pytest.approx(expected, abs=2e-3)
    alone = run("infer", "score", "--input", source, "--reference", "none", "--vision", world.root / "vision",
                "--device", "cpu", "--images", world.root, "--json")  # fmt: skip
    assert alone.summary["clipscore"] == figures["clipscore"]
    assert "bleu_1" not in alone.summary
    with pytest.raises(LlavaError, match=r"no reference under 'caption'.*got a line with image, shard"):
        score.run(ScoreConfig(input=source))
    with pytest.raises(LlavaError, match="some references are Chinese and some are not"):
        score.run(ScoreConfig(input=source, reference="references"))
    with pytest.raises(LlavaError, match="no text under 'reply'"):
        score.run(ScoreConfig(input=source, answer="reply"))


def test_features_that_no_clipscore_can_be_had_from(world: World, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"shard": "part.h5", "row": 99, "answer": "红"}))
    flags: dict[str, Any] = {"input": source, "vision": world.root / "vision", "device": "cpu"}
    with pytest.raises(LlavaError, match="names no row of --features"):
        score.run(ScoreConfig(**flags, features=world.root / "features"))
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
