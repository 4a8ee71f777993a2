"""`llava export`: what transformers alone says of a picture is what `infer` says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from infer.answerer import ImageAnswerer, open_image_answerer
from infer.chat.image_dialogue import ImageDialogue
from infer.config import AskConfig
from llava_align.config import MODELS
from llava_align.hub.config import ExportConfig
from llava_align.hub.export import run as export_run
from llava_align.hub.export import write_settings
from llava_core.errors import LlavaError
from llava_core.geometry import Fit
from llava_core.language.load import load_language_model
from llava_core.language.sampling import Sampling
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import write_checkpoint
from tests.support.commands import call
from tests.support.exported import QUESTIONS
from tests.support.language_models import LLAMA_TEMPLATE, byte_tokenizer, write_language_model
from tests.support.paths import ROOT
from tests.support.vision_encoders import VISION, write_hugging_face, write_vision_folder

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
PAD = 263
"""The last row of the embedding of a small language model."""
SIZES |= {"image_size": 28, "patch_size": 7}
Elsewhere = Callable[[Path, list[Path]], dict[str, Any]]
"""What another process says of a folder and pictures."""


def write_pictures(folder: Path) -> list[Path]:
    """A JPEG that is decoded small, one that lies on its side, and a PNG with holes."""
    torch.manual_seed(0)
    noise = torch.randint(256, (3, 9, 12, 4), dtype=torch.uint8).numpy()
    paths = [folder / name for name in ("large.jpg", "turned.jpg", "holes.png")]
    large, turned, holes = (Image.fromarray(each).resize((640, 480)) for each in noise)
    large.convert("RGB").save(paths[0], quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.convert("RGB").save(paths[1], exif=exif)
    holes.save(paths[2])
    return paths


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """tests/support/exported.py in a process that knows installed packages, but not this project."""
    place = tmp_path_factory.mktemp("elsewhere")
    # -S leaves out the .pth file that makes this project importable.
    with subprocess.Popen(
        [sys.executable, "-S", ROOT / "tests/support/exported.py"],
        cwd=place,
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            # Another folder of packages tries another transformers.
            "PYTHONPATH": os.environ.get("EXPORT_PACKAGES", sysconfig.get_path("purelib")),
            "HF_MODULES_CACHE": str(place / "modules"),
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def talk(folder: Path, pictures: list[Path]) -> dict[str, Any]:
            print(json.dumps(list(map(str, [folder, *pictures]))), file=stdin, flush=True)
            assert stdout.readline() == f"{folder}.pt\n"
            result: dict[str, Any] = torch.load(f"{folder}.pt", weights_only=True)
            return result

        yield talk
        stdin.close()
        assert process.wait() == 0


def opened(config: ExportConfig) -> ImageAnswerer:
    """As on a GPU, if it was exported in half the space: all but the projector in that type."""
    models = {name: getattr(config, name) for name in ("checkpoint", "vision", "llm")}
    aligned = open_image_answerer(AskConfig(**models, image=("",), device="cpu"))
    if (dtype := getattr(torch, config.dtype)) != torch.float32:
        aligned.tower = open_vision_tower(config.vision, dtype=dtype)
        aligned.llm = load_language_model(config.llm, dtype=dtype)
    return aligned


@torch.inference_mode()
def equals_infer(elsewhere: Elsewhere, config: ExportConfig, pictures: list[Path]) -> dict[str, Any]:
    theirs = elsewhere(config.out, pictures)
    aligned = opened(config)
    decoded = [aligned.decode(path.read_bytes()) for path in pictures]
    pixels = torch.stack([torch.as_tensor(each.pixels) for each in decoded])
    assert torch.equal(theirs["pixels"], aligned.tower.preprocess.normalise(pixels))
    assert theirs["same"]
    assert theirs["untouched"]

    ids = aligned.conversation.prompt([{"role": "user", "content": QUESTIONS[0]}])
    text = aligned.embed(ids).expand(len(pictures), -1, -1)
    logits = aligned.llm.model(inputs_embeds=torch.cat([aligned.encode_images(decoded), text], dim=1)).logits
    if config.dtype == "float32":
        torch.testing.assert_close(theirs["logits"], logits, rtol=1e-4, atol=1e-4)
    else:  # sums in another order, each rounded
        assert theirs["logits"].dtype == logits.dtype
        assert (theirs["logits"] - logits).float().norm() < 0.02 * logits.float().norm()
    assert (theirs["rounded"] - logits).abs().max() < 0.2 * logits.abs().max()

    session = ImageDialogue(aligned, Sampling(max_tokens=12))
    said: list[str] = []
    for path in reversed(pictures):
        session.show(str(path))
        said.insert(0, "".join(session.ask(QUESTIONS[0])))
    assert len(set(said)) > 1
    second = "".join(session.ask(QUESTIONS[1]))
    assert theirs["again"] == theirs["batch"]
    assert theirs["tuned"] != theirs["alone"]
    session.begin()
    bare = "".join(session.ask(QUESTIONS[0]))
    if config.dtype == "float32":  # of rounded logits the two likeliest may be equal: processors differ then
        assert theirs["alone"] == said
        assert theirs["second"] == second
        assert theirs["batch"] == said
        assert theirs["pipeline"] == [said, said]
        assert theirs["unlike"] == [second, said[1]]
        assert theirs["text"] == bare
    return theirs


def test_chinese_clip_and_qwen3(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """ModelScope's layout, a JPEG decoded small, through the command; the folder says what it is."""
    vision = write_vision_folder(tmp_path / "clip", vision={**VISION, "vision_patch_size": 8})
    llm = write_language_model(tmp_path / "qwen")
    (llm / "LICENSE").write_text("as you like")
    config = write_checkpoint(tmp_path / "c", vision, llm, "mlp", "shuffle", None, "draft")
    flags = ("--checkpoint", tmp_path / "c", "--vision", vision, "--llm", llm, "--out", config.out)
    planned = call("llava_align", "export", *flags, "--dry-run", "--json").summary
    assert not config.out.exists()
    assert call("llava_align", "export", *flags, "--json").summary["bytes"] == planned["bytes"]
    weights = load_file(config.out / "model.safetensors")
    assert sum(tensor.nbytes for tensor in weights.values()) == planned["bytes"]
    assert "language_model.lm_head.weight" not in weights
    assert len({(config.out / name).stat().st_mode for name in ("model.safetensors", "config.json")}) == 1
    assert (config.out / "LICENSE-llm").read_text() == "as you like"
    card = (config.out / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-text-to-text\n" in card
    assert "| eval_loss | 1.25 |" in card
    assert str(tmp_path) not in "".join(path.read_text() for path in config.out.glob("*.json"))
    equals_infer(elsewhere, config, write_pictures(tmp_path))
    assert (
        "exists; expected a new or empty folder" in call("llava_align", "export", *flags, code=1).one_line()
    )


def test_hugging_face_clip_and_llama(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """The tokenizer uses every row of the embedding, and pads with the last."""
    torch.manual_seed(0)
    vision = write_hugging_face(
        tmp_path / "vision",
        CLIPVisionModel(CLIPVisionConfig(**SIZES)),
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        do_center_crop=True,
    )
    llm = write_language_model(tmp_path / "llm", "llama", template=LLAMA_TEMPLATE)
    tokenizer = byte_tokenizer(LLAMA_TEMPLATE)
    tokenizer.add_tokens(["<|1|>", "<|2|>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(llm)
    config = write_checkpoint(tmp_path / "c", vision, llm, "linear", "pool", None, "exact")
    config.out.mkdir()
    export_run(config)
    pictures = write_pictures(tmp_path)
    equals_infer(elsewhere, config, pictures)
    assert json.loads((config.out / "config.json").read_text())["image_token_id"] == PAD - 1
    words = json.loads((config.out / "tokenizer_config.json").read_text())
    assert isinstance(words.get("extra_special_tokens", {}), dict)  # as transformers 4 reads it

    # in a folder that an older version wrote, the mask alone tells a picture from padding
    (config.out / "SHA256SUMS").unlink()
    for name in ("config.json", "processor_config.json"):
        path = config.out / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": PAD}))
    equals_infer(elsewhere, config, pictures)
    assert not config.out.with_name("exported.part").exists()


def test_siglip_at_an_earlier_layer(tmp_path: Path, elsewhere: Elsewhere) -> None:
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**SIZES))
    vision = write_hugging_face(tmp_path / "vision", model, size={"height": 28, "width": 28}, resample=3)
    llm = write_language_model(tmp_path / "llm")
    config = write_checkpoint(tmp_path / "c", vision, llm, "linear", "all", -2, "draft")
    export_run(config)
    equals_infer(elsewhere, config, write_pictures(tmp_path))


def test_the_demo_s_models(tmp_path: Path, elsewhere: Elsewhere) -> None:
    vision, llm = (MODELS / name for name in ("vision", "llm"))
    config = write_checkpoint(tmp_path / "c", vision, llm, "linear", "all", None, "draft")
    export_run(config)
    equals_infer(elsewhere, config, write_pictures(tmp_path))


@pytest.mark.parametrize(
    ("visual_tokens", "fit", "decode"), [("pool3", "pad", "draft"), ("shuffle3", "crop", "exact")]
)
def test_larger_blocks_of_pictures_of_another_fit(
    tmp_path: Path, elsewhere: Elsewhere, visual_tokens: str, fit: Fit, decode: str
) -> None:
    vision, llm = (MODELS / name for name in ("vision", "llm"))
    config = write_checkpoint(tmp_path / "c", vision, llm, "mlp", visual_tokens, None, decode, fit)
    export_run(config)
    equals_infer(elsewhere, config, write_pictures(tmp_path))


@pytest.mark.parametrize(
    ("kind", "feature_norm", "dtype"),
    [("mlp3x9", "center", "float32"), ("lowrank", "layer", "bfloat16"), ("mlp", "center", "bfloat16")],
)
def test_other_maps_of_each_token(
    tmp_path: Path, elsewhere: Elsewhere, kind: str, feature_norm: str, dtype: Literal["float32", "bfloat16"]
) -> None:
    vision, llm = (MODELS / name for name in ("vision", "llm"))
    given = (tmp_path / "c", vision, llm, kind, "shuffle", None, "draft")
    config = dataclasses.replace(write_checkpoint(*given, feature_norm=feature_norm), dtype=dtype)
    export_run(config)
    equals_infer(elsewhere, config, write_pictures(tmp_path))


@pytest.mark.parametrize("kind", ["perceiver4", "cabstractor4", "ldp3", "tokenpacker"])
def test_what_the_exported_model_cannot_compute_is_refused(tmp_path: Path, kind: str) -> None:
    vision, llm = (MODELS / name for name in ("vision", "llm"))
    write_checkpoint(tmp_path / "c", vision, llm, kind, "all", None, "draft")
    flags = ("--checkpoint", tmp_path / "c", "--vision", vision, "--llm", llm, "--out", tmp_path / "exported")
    line = call("llava_align", "export", *flags, code=1).one_line()
    assert (
        f"has a {kind.rstrip('34')} projector, which no exported model computes; expected linear, mlp,"
        in line
    )
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_space_answers_as_a_gpu_does(
    tmp_path: Path, elsewhere: Elsewhere, dtype: Literal["bfloat16", "float16"]
) -> None:
    vision, llm = (MODELS / name for name in ("vision", "llm"))
    whole = write_checkpoint(tmp_path / "c", vision, llm, "linear", "all", None, "draft")
    config = dataclasses.replace(whole, dtype=dtype)
    planned = export_run(dataclasses.replace(whole, dry_run=True))["bytes"]
    assert export_run(config)["bytes"] < 0.6 * planned
    equals_infer(elsewhere, config, write_pictures(tmp_path))


def test_weights_of_a_gguf_file_are_no_longer_quantised(tmp_path: Path) -> None:
    """Told otherwise, transformers refuses to save the model that it has loaded."""
    vision, llm = write_vision_folder(tmp_path / "clip"), write_language_model(tmp_path / "llm")
    config = write_checkpoint(tmp_path / "c", vision, llm, "linear", "all", None, "draft")
    loaded = load_language_model(llm)
    loaded.model.config.quantization_config = {"quant_method": "gguf"}
    gguf = dataclasses.replace(config, llm=tmp_path)  # it has no config.json
    write_settings(gguf, open_vision_tower(vision), load_checkpoint(config.checkpoint), loaded, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["hidden_size"] == 32
    assert "quantization_config" not in text
    assert str(tmp_path) not in json.dumps(text)


def test_what_does_not_belong_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision, llm = write_vision_folder(tmp_path / "clip"), write_language_model(tmp_path / "llm")
    config = write_checkpoint(tmp_path / "c", vision, llm, "linear", "all", None, "draft")
    other = write_language_model(tmp_path / "other", seed=1)
    with pytest.raises(LlavaError, match="trained for another language model"):
        export_run(dataclasses.replace(config, llm=other))
    with pytest.raises(LlavaError, match="is inside the checkpoint; give --out beside it"):
        dataclasses.replace(config, out=config.checkpoint / "exported").require_inputs()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LlavaError, match="is the folder you are in; give a name in it"):
        dataclasses.replace(config, out=Path()).require_inputs()
    with pytest.raises(LlavaError, match=r"^--check; expected it with --to gguf") as raised:
        dataclasses.replace(config, check=3)
    assert raised.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "clip", "here", "llm", "other"]
