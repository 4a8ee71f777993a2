"""The vision tower beside the published code, and every layout a folder may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_core.errors import LlavaError
from llava_core.vision.chinese_clip import CONTEXT, ChineseClip
from llava_core.vision.open import open_vision_tower
from tests.support.vision_encoders import (
    TEXT,
    VISION,
    VOCAB,
    published_clip,
    published_tokens,
    published_vocabulary,
    write_vision_folder,
)

VIT_B_16 = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 16,
}

ROBERTA_BASE = {
    **TEXT,
    "vocab_size": 21128,
    "text_hidden_size": 768,
    "text_intermediate_size": 3072,
    "text_max_position_embeddings": 512,
    "text_num_attention_heads": 12,
    "text_num_hidden_layers": 12,
}


def all_tokens(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What cn-clip computes before it keeps the class token alone, after its own `ln_post`."""
    kept: list[torch.Tensor] = []
    hook = clip.visual.transformer.register_forward_hook(lambda module, args, out: kept.append(out))
    clip.visual(pixels)
    hook.remove()
    tokens: torch.Tensor = clip.visual.ln_post(kept[0].permute(1, 0, 2))
    return tokens


def some_pixels(side: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def test_the_reference_shape_equals_the_published_code(tmp_path: Path) -> None:
    clip = published_clip(VIT_B_16)
    tower = open_vision_tower(write_vision_folder(tmp_path, clip.state_dict(), VIT_B_16))
    pixels = some_pixels(224)
    features = tower.encode(pixels)
    expected = all_tokens(clip, tower.preprocess.normalise(pixels))
    assert features.shape == (2, 197, 768) == (2, tower.tokens, tower.width)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_embeddings_equal_the_published_code(tmp_path: Path) -> None:
    clip = published_clip()
    folder = write_vision_folder(tmp_path, clip.state_dict())
    tower = open_vision_tower(folder, text=True)
    pixels = some_pixels(32)
    image = F.normalize(clip.encode_image(tower.preprocess.normalise(pixels)), dim=-1)
    torch.testing.assert_close(tower.encode_image_embedding(pixels), image, rtol=1e-5, atol=1e-5)

    cls, sep = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")
    words = [[5, 7, 8, 9], [10, 11, 1]]  # 红色的圆; ab and an unknown character
    ids = torch.tensor([[cls, *w, sep] + [0] * (CONTEXT - 2 - len(w)) for w in words])
    text = F.normalize(clip.encode_text(ids), dim=-1)
    torch.testing.assert_close(tower.encode_text(["红色的圆", "AB 猫"]), text, rtol=1e-5, atol=1e-5)
    with pytest.raises(LlavaError, match="opened with its text tower"):
        open_vision_tower(folder).encode_text(["红"])


@torch.no_grad()
def test_texts_of_the_reference_shape_equal_the_published_code(tmp_path: Path) -> None:
    """Word pieces of the real vocabulary and the real text tower's shape, beside a small image tower."""
    vision = {**VISION, "embed_dim": 512}
    clip, vocab = published_clip(vision, text=ROBERTA_BASE), published_vocabulary()
    tower = open_vision_tower(
        write_vision_folder(tmp_path, clip.state_dict(), vision, text=ROBERTA_BASE, vocab=vocab), text=True
    )
    texts = ["一只橘猫躺在沙发上。", "Two DOGS, naïve 2024年", "長" * 80, "  ", "🐱 𠮷野家 [SEP] a​b"]
    ids = published_tokens(texts, CONTEXT)
    assert tower._tokenizer is not None
    assert torch.equal(tower._tokenizer(texts), ids)
    expected = F.normalize(clip.encode_text(ids), dim=-1)
    torch.testing.assert_close(tower.encode_text(texts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "clip_model.", "module.clip_model."])
def test_published_names(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    expected = open_vision_tower(write_vision_folder(tmp_path / "a")).encode(some_pixels(32))
    folder = write_vision_folder(tmp_path / "b")
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)["state_dict"]
    renamed = {prefix + name.removeprefix("module.clip_model."): value for name, value in loaded.items()}
    renamed[prefix + "bert.pooler.dense.weight"] = torch.zeros(1)
    torch.save({"state_dict": renamed} if wrapped else renamed, folder / "pytorch_model.bin")
    assert torch.equal(open_vision_tower(folder).encode(some_pixels(32)), expected)


def test_the_frozen_tower_is_what_it_says(tmp_path: Path) -> None:
    tower = open_vision_tower(write_vision_folder(tmp_path / "small-clip"))
    assert tower.encoder["model_id"] == "small-clip"
    assert (tower.tokens, tower.width, tower.encoder["layer"]) == (5, 64, None)
    assert tower.preprocess.size == 32
    assert not tower.encode(some_pixels(32)).requires_grad


def test_layers_count_as_in_transformers(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path)
    last, same = open_vision_tower(folder, layer=-1), open_vision_tower(folder, layer=2)
    assert last.identity.fingerprint == same.identity.fingerprint
    assert len({open_vision_tower(folder, layer=k).identity.fingerprint for k in (None, -1, -2, -3)}) == 4
    clip = last.network
    assert isinstance(clip, ChineseClip)
    normed = clip.visual.ln_post(last.encode(some_pixels(32)))
    torch.testing.assert_close(normed, open_vision_tower(folder).encode(some_pixels(32)))
    with pytest.raises(LlavaError, match=r"has no layer 3; expected -3 to 2"):
        open_vision_tower(folder, layer=3)


def test_the_fingerprint_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path / "a")
    prints = [
        open_vision_tower(folder).identity.fingerprint,
        open_vision_tower(write_vision_folder(tmp_path / "b")).identity.fingerprint,
        open_vision_tower(folder, dtype=torch.bfloat16).identity.fingerprint,
        open_vision_tower(folder, decode="exact").identity.fingerprint,
        open_vision_tower(write_vision_folder(tmp_path / "c", seed=1)).identity.fingerprint,
    ]
    assert prints[0] == prints[1] == prints[2]
    assert len(set(prints)) == 3


SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUASH = {"height": 28, "width": 28}
CASES: list[tuple[Any, Any, int, dict[str, Any], str]] = [
    (ChineseCLIPVisionModel, ChineseCLIPVisionConfig(**SIZES, image_size=28, patch_size=14), 5,
     {"size": SQUASH, "do_center_crop": False}, "squash"),
    (CLIPVisionModel, CLIPVisionConfig(**SIZES, image_size=28, patch_size=14), 5,
     {"size": {"shortest_edge": 28}, "crop_size": SQUASH, "do_center_crop": True}, "center 28"),
    (CLIPVisionModel, CLIPVisionConfig(**SIZES, image_size=28, patch_size=14), 5,
     {"size": 28, "crop_size": 28, "do_center_crop": True}, "center 28"),
    (SiglipVisionModel, SiglipVisionConfig(**SIZES, image_size=28, patch_size=14), 4,
     {"size": SQUASH, "resample": 3}, "squash"),
    (Dinov2Model, Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                               patch_size=14), 5,
     {"size": {"shortest_edge": 32}, "crop_size": SQUASH, "do_center_crop": True, "resample": 2},
     "center 32"),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("kind", "config", "tokens", "preprocessor", "crop"), CASES)
def test_hugging_face_folders(
    kind: Any, config: Any, tokens: int, preprocessor: dict[str, Any], crop: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    means = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**preprocessor, **means}))
    tower = open_vision_tower(tmp_path)
    assert (tower.tokens, tower.width) == (tokens, 24)
    assert (tower.preprocess.size, tower.preprocess.crop) == (28, crop)
    assert tower.preprocess.mean == (0.4, 0.5, 0.6)
    assert tower.preprocess.filter == ("bilinear" if preprocessor.get("resample") == 2 else "bicubic")

    pixels = some_pixels(28)
    normalised = tower.preprocess.normalise(pixels)
    out = model(pixel_values=normalised, output_hidden_states=True)
    features = tower.encode(pixels)
    # The class token after the last norm is what every one of them pools.
    pooled = out.pooler_output if tokens == 5 else out.last_hidden_state[:, 0]
    torch.testing.assert_close(features[:, 0], pooled)
    before = open_vision_tower(tmp_path, layer=-2)
    torch.testing.assert_close(before.encode(pixels), out.hidden_states[-2])


TEXT_SIZES = {**SIZES, "vocab_size": len(VOCAB), "max_position_embeddings": 77}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["chinese_clip", "clip"])
def test_both_towers_of_hugging_face_equal_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision, ends = {**SIZES, "image_size": 28, "patch_size": 14}, VOCAB.index("[SEP]")
    model: Any
    if kind == "clip":
        text = {**TEXT_SIZES, "bos_token_id": VOCAB.index("[CLS]"), "eos_token_id": ends, "pad_token_id": 0}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    else:
        config = ChineseCLIPConfig(text_config=TEXT_SIZES, vision_config=vision, projection_dim=16)
        model = ChineseCLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = {"size": SQUASH, "do_center_crop": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(size))
    tower, pixels = open_vision_tower(tmp_path, text=True), some_pixels(28)
    normalised = tower.preprocess.normalise(pixels)
    words = [[5, 7, 8, 9], [10, 11, 1]]
    ids = torch.tensor([[2, *own, ends] + [0] * (4 - len(own)) for own in words])
    both = model(input_ids=ids, attention_mask=ids.ne(0).long(), pixel_values=normalised)
    torch.testing.assert_close(tower.encode_image_embedding(pixels), both.image_embeds)
    torch.testing.assert_close(tower.embed_features(tower.encode(pixels)), both.image_embeds)
    torch.testing.assert_close(tower.encode_text(["红色的圆", "AB 猫"]), both.text_embeds)
    assert tower.reads_text
    assert not open_vision_tower(tmp_path).reads_text
    assert tower.cuts("红" * (tower.most_tokens + 1))
    assert not tower.cuts("红" * tower.most_tokens)


@pytest.mark.parametrize(
    "name", ["vision_model_config.json", "text_model_config.json", "vocab.txt", "pytorch_model.bin"]
)
def test_a_lacking_file_is_named(tmp_path: Path, name: str) -> None:
    (write_vision_folder(tmp_path) / name).unlink()
    with pytest.raises(LlavaError, match=name):
        open_vision_tower(tmp_path)


def test_damage_is_said_in_one_line(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path / "a")
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(LlavaError, match=r"cannot load .*pytorch_model\.bin"):
        open_vision_tower(folder)
    other = write_vision_folder(tmp_path / "b")
    (other / "vision_model_config.json").write_text(json.dumps({**VISION, "vision_layers": 3}))
    with pytest.raises(LlavaError, match=r"cannot load .*pytorch_model\.bin"):
        open_vision_tower(other)
    (other / "vision_model_config.json").write_text("{")
    with pytest.raises(LlavaError, match="damaged"):
        open_vision_tower(other)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match=r"no vision folder .*`llava download models`"):
        open_vision_tower(tmp_path / "nowhere")
    with pytest.raises(LlavaError, match="holds no vision encoder"):
        open_vision_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(LlavaError, match="got qwen3"):
        open_vision_tower(tmp_path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path)
    torch.save({"state_dict": {"x": Path("/")}}, folder / "pytorch_model.bin")
    with pytest.raises(LlavaError, match="cannot load"):
        open_vision_tower(folder)
