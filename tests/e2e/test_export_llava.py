"""`llava export --to llava`: LlavaForConditionalGeneration says what `infer` says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from infer.chat.image_dialogue import ImageDialogue
from llava_align.hub.config import ExportConfig
from llava_align.hub.export import run as export_run
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from tests.e2e.test_export import SIZES, opened, write_pictures
from tests.support.aligned import write_checkpoint
from tests.support.exported import QUESTIONS, message
from tests.support.language_models import write_language_model
from tests.support.vision_encoders import write_hugging_face, write_vision_folder

CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
GREY = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def write_encoder(folder: Path, name: str) -> Path:
    if name == "chinese-clip":
        write_vision_folder(folder)
        return folder
    square = {"size": {"height": 28, "width": 28}}
    if name == "clip":
        return write_hugging_face(folder, CLIPVisionModel(CLIPVisionConfig(**SIZES)), **GREY, **CROPPED)
    if name == "siglip":
        return write_hugging_face(folder, SiglipVisionModel(SiglipVisionConfig(**SIZES)), **GREY, **square)
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return write_hugging_face(folder, Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)), **GREY, **CROPPED)


def write(
    tmp_path: Path, encoder: str, kind: str, tokens: str, layer: int | None = -2, llm: Any = None, **more: Any
) -> ExportConfig:
    vision, llm = write_encoder(tmp_path / "vision", encoder), llm or write_language_model(tmp_path / "llm")
    config = write_checkpoint(tmp_path / "c", vision, llm, kind, tokens, layer, "exact", **more)
    return dataclasses.replace(config, to="llava")


@pytest.mark.parametrize(
    ("encoder", "kind", "tokens", "more"),
    [
        ("clip", "mlp", "patches", {}),
        ("clip", "linear", "all", {"feature_norm": "center"}),
        ("siglip", "lowrank", "patches", {}),
        ("chinese-clip", "mlp", "patches", {"fit": "squash"}),
        ("dinov2", "linear", "patches", {}),
    ],
)
@torch.inference_mode()
def test_the_same_answers(tmp_path: Path, encoder: str, kind: str, tokens: str, more: dict[str, Any]) -> None:
    config, pictures = write(tmp_path, encoder, kind, tokens, **more), write_pictures(tmp_path)
    export_run(config)
    assert not list(config.out.glob("*.py"))
    model, loading = AutoModelForImageTextToText.from_pretrained(config.out, output_loading_info=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not any(loading.values())
    processor = AutoProcessor.from_pretrained(config.out)

    aligned = opened(config)
    decoded = [aligned.decode(path.read_bytes()) for path in pictures]
    pixels = aligned.tower.preprocess.normalise(torch.stack([torch.as_tensor(d.pixels) for d in decoded]))
    dialogues = [[message("user", QUESTIONS[0], str(path))] for path in pictures]
    inputs = processor.apply_chat_template(
        dialogues, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values"][0], pixels[0])  # the others lie on their side, or have holes
    inputs["pixel_values"] = pixels

    ids = aligned.conversation.prompt([{"role": "user", "content": QUESTIONS[0]}])
    text = aligned.embed(ids).expand(len(pictures), -1, -1)
    logits = aligned.llm.model(inputs_embeds=torch.cat([aligned.encode_images(decoded), text], 1)).logits
    # Features are rounded to fp16 in training, and not here.
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=0.01, atol=0.01)
    said = model.generate(**inputs, max_new_tokens=12)[:, inputs["input_ids"].shape[1] :]
    session, expected = ImageDialogue(aligned, Sampling(max_tokens=12)), []
    for path in pictures:
        session.show(str(path))
        expected.append("".join(session.ask(QUESTIONS[0])))
    assert processor.batch_decode(said, skip_special_tokens=True) == expected


def test_a_vocabulary_without_a_free_row(tmp_path: Path) -> None:
    """It grows by the image token, which is never said."""
    llm = write_language_model(tmp_path / "llm")
    full = AutoModelForCausalLM.from_pretrained(llm)
    words = len(AutoTokenizer.from_pretrained(llm))
    full.resize_token_embeddings(words)
    full.save_pretrained(llm)
    export_run(write(tmp_path, "clip", "mlp", "patches", llm=llm))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    assert model.get_input_embeddings().weight.shape[0] == words + 1
    assert model.generation_config.suppress_tokens == [model.config.image_token_index] == [words]


@pytest.mark.parametrize("kind", ["gemma2", "mamba"])
def test_language_models_of_more_than_blocks_and_a_matrix_are_refused(tmp_path: Path, kind: str) -> None:
    """Gemma 2 caps its logits; Mamba's weights have other names, which transformers would leave out."""
    config = write(tmp_path, "clip", "mlp", "patches", llm=write_language_model(tmp_path / "llm", kind))
    with pytest.raises(LlavaError, match=r"blocks and a vocabulary matrix; .*--to transformers"):
        export_run(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("kind", "tokens", "layer", "norm", "expected"),
    [
        ("mlp", "patches", None, "none", "features after it"),
        ("mlp", "pool", -2, "none", "got pool"),
        ("mlp3", "patches", -2, "none", "one or two linear layers"),
        ("mlp2x9", "patches", -2, "none", "as wide as the language model"),
        ("linear", "patches", -2, "layer", "--feature-norm layer"),
    ],
)
def test_what_it_cannot_compute_is_refused(
    tmp_path: Path, kind: str, tokens: str, layer: int | None, norm: str, expected: str
) -> None:
    config = write(tmp_path, "clip", kind, tokens, layer, feature_norm=norm)
    with pytest.raises(LlavaError, match=expected):
        export_run(config)
    assert not config.out.exists()
