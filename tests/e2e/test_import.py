"""`llava import`: others' projectors answer as they did, and only beside the models they fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from extract.config import RunConfig as ExtractConfig
from extract.run import run as extract_run
from infer.answerer import open_image_answerer
from infer.config import AskConfig
from llava_align.hub.config import ImportConfig
from llava_align.hub.import_projector import run as import_run
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.projector.checkpoint import load_checkpoint, load_state
from llava_core.projector.projector import build_projector
from llava_core.vision.open import open_vision_tower
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call, run
from tests.support.local_data import write_parquet, write_pictures
from tests.support.vision_encoders import VISION, write_vision_folder
from train.config import EvalConfig
from train.evaluate import run as eval_run

WIDTH, HIDDEN = 64, 32


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


def config(world: Folders, tmp_path: Path, weights: object) -> ImportConfig:
    torch.save(weights, tmp_path / "given.bin")
    return ImportConfig(
        file=tmp_path / "given.bin", vision=world.vision, llm=world.llm, out=tmp_path / "imported"
    )


def llava_mlp(
    in_width: int = WIDTH, between: int = HIDDEN, out_width: int = HIDDEN
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    name = "model.mm_projector"
    return {
        f"{name}.0.weight": torch.randn(between, in_width),
        f"{name}.0.bias": torch.randn(between),
        f"{name}.2.weight": torch.randn(out_width, between),
        f"{name}.2.bias": torch.randn(out_width),
    }


def test_the_course_projector_answers_as_it_did(world: Folders, tmp_path: Path) -> None:
    """The state dict of a trained checkpoint, by the course's names, gives that checkpoint's answers."""
    trained = load_checkpoint(world.checkpoint)
    file, out = tmp_path / "stage1_projection.pt", tmp_path / "imported"
    torch.save(
        {f"projection.{name}": value for name, value in trained.projector.map.state_dict().items()}, file
    )
    models = ("--vision", world.vision, "--llm", world.llm)
    ended = run("llava_align", "import", "--file", file, *models, "--out", out, "--json")
    assert "layer: after the last norm (assumed, since the course projects all tokens" in ended.err
    assert "trained by: course (assumed: no other project's names)" in ended.err
    assert "GELU" not in ended.err
    assert ended.summary["visual_tokens"] == "all"

    imported = load_checkpoint(out)
    assert imported.provenance == trained.provenance
    image = world.images[0].read_bytes()
    aligned = open_image_answerer(
        AskConfig(checkpoint=out, vision=world.vision, llm=world.llm, image=("",), device="cpu")
    )
    assert torch.equal(aligned.encode_files([image]), world.aligned().encode_files([image]))
    sha256 = ended.summary["sha256"]
    assert len(sha256) == 64
    assert imported.training["imported"]["file"] == "stage1_projection.pt"
    assert imported.metrics["imported_sha256"] == sha256
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"`stage1_projection.pt` (sha256 `{sha256}`)" in card
    assert "imported for use between these two: only their widths were checked" in card
    assert "trained" not in card

    with pytest.raises(
        LlavaError, match=r"has no state\.pt, so no run continues from it; it is of use to infer"
    ):
        load_state(out)
    again = run("llava_align", "import", "--file", file, *models, "--out", out, code=1)
    assert "is there already; choose another" in again.one_line()


def test_llava_takes_the_patches_of_the_layer_before_the_last(
    world: Folders, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = llava_mlp()
    import_run(config(world, tmp_path, {name: value.bfloat16() for name, value in weights.items()}))
    said = capfd.readouterr().err
    assert "trained by: LLaVA (by names)" in said
    assert "layer: hidden states -2 (assumed, since LLaVA projects the patches" in said
    assert "visual tokens: patches (5→4)" in said
    assert "between its layers: exact GELU, not tanh's (assumed: the weights do not say)" in said
    out = tmp_path / "imported"
    aligned = open_image_answerer(
        AskConfig(checkpoint=out, vision=world.vision, llm=world.llm, image=("",), device="cpu")
    )
    tower = open_vision_tower(world.vision, layer=-2)
    decoded = tower.preprocess.decode_image(world.images[0].read_bytes())
    features = tower.encode(decoded.pixels[None])[:, 1:].half().float()
    first, bias, second, more = (value.bfloat16().float() for value in weights.values())
    expected = torch.nn.GELU()(features @ first.T + bias) @ second.T + more
    seen = aligned.encode_files([world.images[0].read_bytes()])
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)

    # features of that layer, and of no other, are what it is evaluated on
    write_pictures(tmp_path / "set", ["0.jpg", "1.jpg"])
    write_parquet(tmp_path / "set/data.parquet", image=["0.jpg", "1.jpg"], caption=["红", "蓝"])
    for layer in (-2, None):
        data, features_of = str(tmp_path / "set/data.parquet"), tmp_path / f"features{layer}"
        extract_run(ExtractConfig(data=data, out=features_of, vision=world.vision, layer=layer, device="cpu"))
    of_it = EvalConfig(checkpoint=out, features=tmp_path / "features-2", llm=world.llm, device="cpu")
    assert eval_run(of_it)["samples"] == 2
    with pytest.raises(LlavaError, match="layer: 1 vs null"):
        eval_run(dataclasses.replace(of_it, features=tmp_path / "featuresNone"))


def test_three_layers_of_llava(world: Folders, tmp_path: Path) -> None:
    weights = {**llava_mlp(), "model.mm_projector.4.weight": torch.randn(HIDDEN, HIDDEN),
               "model.mm_projector.4.bias": torch.randn(HIDDEN)}  # fmt: skip
    assert import_run(config(world, tmp_path, weights))["kind"] == "mlp3"
    projector = load_checkpoint(tmp_path / "imported").projector
    assert torch.equal(projector.map.state_dict()["4.bias"], weights["model.mm_projector.4.bias"])


@pytest.mark.parametrize("kind", ["perceiver4", "cabstractor4", "tokenpacker"])
def test_other_projectors_are_refused_by_the_names_of_their_weights(
    world: Folders, tmp_path: Path, kind: str
) -> None:
    weights = build_projector(kind, WIDTH, HIDDEN).map.state_dict()
    named = {f"model.mm_projector.{name}": weight for name, weight in weights.items()}
    with pytest.raises(LlavaError, match=r"no projector known here; expected weight and bias, or .*; got "):
        import_run(config(world, tmp_path, named))


def test_what_does_not_fit_is_one_line(world: Folders, tmp_path: Path) -> None:
    vision = write_vision_folder(tmp_path / "vision", vision={**VISION, "vision_patch_size": 8})
    shuffled = dataclasses.replace(config(world, tmp_path, llava_mlp(4 * WIDTH)), vision=vision)
    with pytest.raises(LlavaError, match="expected 64 wide; got 256; give --visual-tokens shuffle"):
        import_run(shuffled)
    told = dataclasses.replace(shuffled, visual_tokens="shuffle", layer="norm")
    assert import_run(told)["tokens"] == 4
    assert load_checkpoint(told.out).provenance.encoder.encoder["layer"] is None
    for weights, message in (
        (llava_mlp(in_width=60), "expected 64 wide; got 60; give the encoder it was trained on"),
        (llava_mlp(out_width=40), "does not fit llm; expected 32 wide; got 40; give the language model"),
        (
            llava_mlp(between=48),
            r"mlp of another shape; expected 0\.weight \[32, 64\]; got \[48, 64\]",
        ),
        (
            {"weight": torch.zeros(HIDDEN, WIDTH), "bias": torch.zeros(7)},
            r"linear of another shape; expected bias \[32\]; got \[7\]",
        ),
    ):
        with pytest.raises(LlavaError, match=message):
            import_run(dataclasses.replace(config(world, tmp_path, weights), out=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    ours = dataclasses.replace(told, file=told.out / "model.safetensors", out=tmp_path / "none")
    with pytest.raises(LlavaError, match=f"is of a checkpoint already; give --checkpoint {told.out}"):
        import_run(ours)
    save_file({"projector.weight": torch.zeros(HIDDEN, WIDTH)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llava_align"}')
    with pytest.raises(LlavaError, match="whole model that `llava export` made; give --checkpoint the one"):
        import_run(dataclasses.replace(ours, file=tmp_path / "model.safetensors"))
    assert load_language_model(world.llm).identity == load_checkpoint(told.out).provenance.language_model


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks by a name of before
def test_the_lora_folder_of_llava_answers_as_peft_does(world: Folders, tmp_path: Path) -> None:
    """adapter_model.bin, of earlier versions of peft, beside the projector in non_lora_trainables.bin."""
    model = AutoModelForCausalLM.from_pretrained(world.llm, dtype=torch.float32)
    lora = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    weights = {
        name.replace(".default", ""): torch.randn_like(value) * 0.1
        for name, value in lora.state_dict().items()
        if "lora_" in name
    }
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    torch.save(weights, folder / "adapter_model.bin")
    lora.peft_config["default"].save_pretrained(str(folder))
    projector = {f"base_model.model.{name}": value for name, value in llava_mlp().items()}
    torch.save(projector, folder / "non_lora_trainables.bin")
    models = ("--vision", world.vision, "--llm", world.llm)
    ended = run("llava_align", "import", "--file", folder, *models, "--out", tmp_path / "out", "--json")
    assert "language model: LoRA adapters, in adapter/" in ended.err
    ours = load_language_model(world.llm)
    load_checkpoint(tmp_path / "out").tune_model(ours)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.llm, dtype=torch.float32), folder
    ).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(stock(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "LoRA adapters of the language model, in `adapter/`" in card

    (folder / "non_lora_trainables.bin").unlink()
    line = run(
        "llava_align", "import", "--file", folder, *models, "--out", tmp_path / "no", code=1
    ).one_line()
    assert "expected a file, or a folder with adapter_config.json and non_lora_trainables.bin" in line


def test_stage_2_files_with_no_numbers_are_one_line(world: Folders, tmp_path: Path) -> None:
    """Not a number, sparse, without content, or a mapping in itself, which ends all the same."""
    model = load_language_model(world.llm).model
    given = {f"llm.{name}": value + 0.01 for name, value in model.state_dict().items()}
    given |= {
        f"projector.{name}": torch.zeros(shape)
        for name, shape in (("weight", (HIDDEN, WIDTH)), ("bias", (HIDDEN,)))
    }
    itself: dict[str, object] = {}
    itself["model"] = itself
    llm = "llm.model.embed_tokens.weight"
    damaged: list[tuple[dict[str, object], str]] = [
        ({**given, llm: given[llm] * float("nan")}, f"nan or inf in {llm}"),
        ({**given, llm: given[llm].to_sparse()}, f"{llm}; expected numbers"),
        ({**given, llm: given[llm].to("meta")}, f"{llm}; expected numbers"),
        ({**given, llm: given[llm].int()}, "holds other weights"),
        (itself, "holds no weights"),
    ]
    models = ("--vision", world.vision, "--llm", world.llm, "--out", tmp_path / "out")
    for weights, message in damaged:
        torch.save(weights, tmp_path / "stage2.pt")
        line = call("llava_align", "import", "--file", tmp_path / "stage2.pt", *models, code=1).one_line()
        assert message in line
    assert not (tmp_path / "out").exists()
