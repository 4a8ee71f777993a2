"""--fit: crop, pad or squash in extract, and what is recorded of it in every command that encodes later."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from infer.answerer import open_image_answerer
from infer.config import AskConfig
from llava_core.shards.folder import open_shards
from llava_core.vision.open import open_vision_tower
from tests.support.commands import call
from tests.support.language_models import write_language_model
from tests.support.vision_encoders import write_vision_folder

SHAPES = [(96, 48), (48, 96), (120, 40), (60, 60)]
"""Width and height of the pictures: a centre crop of the median one keeps half of it."""
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
MEAN = (0.2, 0.5, 0.8)


def square_of(path: Path, side: int) -> Image.Image:
    """LLaVA's expand2square, then a resize."""
    image = Image.open(path)
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), tuple(int(x * 255) for x in MEAN))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of odd shapes, an encoder that crops, one that squashes, a language model."""
    root = tmp_path_factory.mktemp("fit")
    (root / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for k, (width, height) in enumerate(SHAPES):
        noise = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        image.save(root / f"pictures/{k}.png")
        (root / f"pictures/{k}.txt").write_text(f"第{k}张图", encoding="utf-8")
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=24, patch_size=6))
    model.save_pretrained(root / "crops")
    settings = {"size": {"shortest_edge": 24}, "crop_size": 24, "do_center_crop": True, "image_mean": MEAN}
    (root / "crops/preprocessor_config.json").write_text(json.dumps(settings))
    write_vision_folder(root / "squashes")
    write_language_model(root / "llm")
    for fit in ("crop", "pad", "squash"):
        extract(root, root / fit, "crops", "--fit", fit)
    return root


def extract(root: Path, out: Path, vision: str, *flags: object, code: int = 0) -> Any:
    given = ("--data", root / "pictures", "--vision", root / vision, "--out", out, "--device", "cpu")
    return call("extract", "run", *given, *flags, "--json", code=code)


def test_the_encoder_s_own_fit_stays_what_it_was(world: Path, tmp_path: Path) -> None:
    for vision, own in (("crops", "crop"), ("squashes", "squash")):
        extract(world, tmp_path / vision, vision)
        assert "nothing to do" in extract(world, tmp_path / vision, vision, "--fit", own).err
        extract(world, tmp_path / f"{vision}-named", vision, "--fit", own)
        (unnamed,), (named,) = open_shards(tmp_path / vision), open_shards(tmp_path / f"{vision}-named")
        assert unnamed.identity == named.identity
        assert np.array_equal(unnamed.checksums, named.checksums)
    (shard,) = open_shards(tmp_path / "squashes")
    assert shard.preprocess["crop"] == "squash"


def test_padded_features_are_those_of_expand2square(world: Path) -> None:
    (shard,) = open_shards(world / "pad")
    tower = open_vision_tower(world / "crops")
    squares = [np.asarray(square_of(world / f"pictures/{k}.png", 24)) for k in range(len(SHAPES))]
    pixels = [
        tower.preprocess.fitted("pad").decode_image((world / f"pictures/{k}.png").read_bytes()).pixels
        for k in range(len(SHAPES))
    ]
    for ours, theirs in zip(pixels, squares, strict=True):  # alike but at the edge of the picture
        assert np.abs(ours.astype(float) - theirs).mean() < 6
    assert np.array_equal(pixels[3], squares[3])
    for row, own in enumerate(pixels):
        expected = tower.encode(own[None])[0].numpy()
        np.testing.assert_allclose(shard.read(row), expected, rtol=2e-3, atol=2e-3)
    assert len({open_shards(world / fit)[0].identity.fingerprint for fit in ("crop", "pad", "squash")}) == 3


def test_inspect_tells_what_the_crop_drops(world: Path, tmp_path: Path) -> None:
    shown = {}
    for fit in ("crop", "pad", "squash"):
        page = tmp_path / f"{fit}.html"
        ended = call("extract", "inspect", "--out", world / fit, "--html", page, "--json")
        (line,) = [line for line in ended.out.splitlines() if line.startswith("fit ")]
        shown[fit] = " ".join(line.split()[1:])
        assert shown[fit] in page.read_text(encoding="utf-8").replace("&#x27;", "'")
        assert ended.summary["fit"] == fit
        assert ended.summary["kept_area"]["p50"] == (0.5 if fit == "crop" else 1.0)
        assert ended.summary["aspect_ratio"]["p50"] == 2.0
    assert shown == {
        "crop": "crop, keeps 50% of a picture's area (median; 33% at least)",
        "pad": "pad, 50% of a square is padding (median; 67% at most)",
        "squash": "squash, long side 2.00 × short (median; 3.00 at most)",
    }


def test_later_commands_take_the_fit_that_is_recorded(world: Path, tmp_path: Path) -> None:
    """verify, retry-failed, bench, and another extract run without the flag."""
    whole = (world / "pictures/0.png").read_bytes()
    (world / "pictures/0.png").write_bytes(b"damaged")
    extract(world, tmp_path / "out", "crops", "--fit", "pad", "--max-failed", 1)
    (world / "pictures/0.png").write_bytes(whole)
    shard = ("--out", tmp_path / "out", "--vision", world / "crops", "--device", "cpu")
    data = ("--data", world / "pictures")
    assert call("extract", "retry-failed", *shard, *data, "--json").summary["ok"] == len(SHAPES)
    (mended,), (made,) = open_shards(tmp_path / "out"), open_shards(world / "pad")
    assert np.array_equal(mended.read(0), made.read(0))
    verified = call("extract", "verify", *shard, *data, "--sample", 0, "--json").summary
    assert (verified["encoded_again"], verified["changed_rows"]) == (len(SHAPES), 0)
    line = extract(world, tmp_path / "out", "crops", code=1).one_line()
    assert "holds features of another encoder or preprocessing" in line
    assert line.endswith('crop: "pad" vs "center 24"; extract run --fit pad, or choose another --out')
    line = call("extract", "retry-failed", *shard, "--fit", "crop", code=2).one_line()
    assert line == "error: --fit; expected pad, as the shards have it; got crop; leave it out"
    bench = ("--data", world / "pictures", "--vision", world / "crops", "--fit", "pad", "--out", tmp_path)
    assert call("extract", "bench", *bench, "--count", 2, "--json").summary["ok"] == 2


def test_a_projector_of_padded_features_pads_when_it_answers(world: Path, tmp_path: Path) -> None:
    call(
        *("train", "run", "--features", world / "pad", "--llm", world / "llm", "--out", tmp_path / "run"),
        *("--device", "cpu", "--batch-size", 2, "--max-steps", 2),
    )
    models = {"checkpoint": tmp_path / "run/last", "vision": world / "crops", "llm": world / "llm"}
    flags = [part for name, path in models.items() for part in (f"--{name}", path)]
    wide = world / "pictures/2.png"
    aligned = open_image_answerer(AskConfig(**models, image=("",), device="cpu"))  # type: ignore[arg-type]
    pixels = aligned.decode(wide.read_bytes()).pixels
    assert (pixels[0] == [int(255 * x) for x in MEAN]).all()
    assert call("infer", "ask", *flags, "--image", wide, "--device", "cpu", "--json").summary["answer"]
    evaluate = ("train", "eval", *flags[:2], *flags[4:], "--device", "cpu")
    assert call(*evaluate, "--features", world / "pad", "--json").summary["loss"] > 0
    line = call(*evaluate, "--features", world / "crop", code=1).one_line()
    assert line.endswith("make features as it was trained on: extract run --fit pad")
    both = ("--features", world / "pad", "--eval-features", world / "crop", "--llm", world / "llm")
    line = call("train", "run", *both, "--out", tmp_path / "both", "--device", "cpu", code=1).one_line()
    assert 'crop: "pad" vs "center 24"' in line


def test_the_smallest_and_the_longest_picture_are_padded(world: Path) -> None:
    padding = open_vision_tower(world / "crops", fit="pad").preprocess
    for size in ((1, 1), (3000, 2), (2, 3000)):
        buffer = io.BytesIO()
        Image.new("RGB", size, (255, 0, 0)).save(buffer, "JPEG", quality=95)
        pixels = padding.decode_image(buffer.getvalue()).pixels
        assert pixels.shape == (24, 24, 3)
        assert (pixels[..., 0] > 200).any()
        assert size == (1, 1) or (pixels[0, 0] == [int(255 * x) for x in MEAN]).all()
