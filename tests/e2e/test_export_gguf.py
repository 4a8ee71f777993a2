"""`llava export --to gguf`: what llama.cpp itself says of a picture is what `infer` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_align.config import MODELS
from llava_align.hub.gguf_file import Tensor, fitting
from llava_align.hub.gguf_language import PICTURE_FIRST, language_model
from llava_align.hub.llama_cpp import llama_cpp
from llava_align.hub.modelfile import modelfile
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.tuned_weights import AllWeights
from llava_core.projector.checkpoint import load_checkpoint, save_checkpoint
from tests.support.aligned import write_checkpoint
from tests.support.commands import Ended, call, largest_file
from tests.support.language_models import LLAMA_TEMPLATE, write_language_model
from tests.support.vision_encoders import write_hugging_face

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28}
SIZES |= {"patch_size": 7, "intermediate_size": 96}
SQUARE = {"size": {"height": 28, "width": 28}, "resample": 3}
LLM = MODELS / "llm"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's threads wait for each other by spinning, which costs minutes beside other tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write_encoder(folder: Path, kind: str) -> Path:
    """Random weights, large enough for tokens to differ; DINOv2's positions are of larger pictures."""
    torch.manual_seed(0)
    model: Any = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="gelu")),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 56})),
    }[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return write_hugging_face(folder, model, **SQUARE)


def export(folder: Path, *flags: object, code: int = 0, **checkpoint: Any) -> Ended:
    """The command, for a random projector; llama.cpp is asked about three pictures."""
    given: dict[str, Any] = {"llm_folder": LLM, "layer": None, "decode": "exact", **checkpoint}
    config = write_checkpoint(folder / "c", **given)
    models = ("--checkpoint", config.checkpoint, "--vision", config.vision, "--llm", config.llm)
    out = ("--to", "gguf", "--out", folder / "exported", "--check", 3, "--json")
    return call("llava_align", "export", *models, *out, *flags, code=code)


@pytest.mark.parametrize(
    ("encoder", "kind", "visual_tokens", "layer", "feature_norm"),
    [
        ("siglip", "linear", "all", None, "none"),
        ("siglip", "lowrank8", "patches", 2, "layer"),
        ("siglip", "linear", "patches", -1, "center"),
        ("clip", "lowrank8", "pool", None, "center"),
        ("dinov2", "linear", "shuffle", None, "none"),
        ("demo", "linear", "pool3", None, "none"),
    ],
)
def test_llama_cpp_answers_as_infer_does(
    tmp_path: Path, encoder: str, kind: str, visual_tokens: str, layer: int | None, feature_norm: str
) -> None:
    vision = MODELS / "vision" if encoder == "demo" else write_encoder(tmp_path / "vision", encoder)
    chosen: dict[str, Any] = {
        "kind": kind,
        "visual_tokens": visual_tokens,
        "layer": layer,
        "feature_norm": feature_norm,
    }
    ended = export(tmp_path, vision=vision, **chosen)
    summary = ended.summary
    assert summary["same_as_squares"] == summary["pictures"] == 3
    assert "same_given_its_tokens" not in summary
    assert "25814" not in ended.err
    files = {path.name: path.stat().st_size for path in (tmp_path / "exported").iterdir()}
    assert set(files) == {"model.gguf", "mmproj.gguf", "Modelfile", "SHA256SUMS"}
    assert 0 < files["model.gguf"] + files["mmproj.gguf"] - summary["bytes"] < 100_000


@pytest.mark.parametrize(("kind", "visual_tokens"), [("linear", "all"), ("mlp", "patches")])
def test_where_llama_cpp_loses_a_patch_a_line_says_so(tmp_path: Path, kind: str, visual_tokens: str) -> None:
    """Its answers are those of `infer` from the tokens that it sends: the file is right."""
    ended = export(tmp_path, vision=MODELS / "vision", kind=kind, visual_tokens=visual_tokens)
    assert "llama.cpp leaves out the first patch and sends the class token last" in ended.err
    assert ended.summary["same_given_its_tokens"] == 3
    assert (
        "padding them with (122, 116, 104), this projector was trained on pictures made square by squash"
        in (ended.err)
    )


def test_padded_pictures_are_the_same(tmp_path: Path) -> None:
    """With CLIP's means, whose colour llama.cpp pads with. Other sizes may be off by a row: it rounds up."""
    torch.manual_seed(0)
    vision = write_hugging_face(tmp_path / "vision", SiglipVisionModel(SiglipVisionConfig(**SIZES)), **SQUARE)
    (tmp_path / "pictures").mkdir()
    for name, size in (("a", (256, 144)), ("b", (56, 112))):
        noise = torch.randint(256, (5, 7, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize(size).save(tmp_path / f"pictures/{name}.png")
    flags = ("--check-images", tmp_path / "pictures")
    ended = export(tmp_path, *flags, vision=vision, kind="linear", visual_tokens="all", fit="pad")
    assert ended.summary["same_as_they_are"] == ended.summary["pictures"] == 2
    assert "padding" not in ended.err


@pytest.mark.parametrize(
    ("dtype", "types"),
    [
        ("float16", {GGMLQuantizationType.F16}),
        ("q8_0", {GGMLQuantizationType.Q8_0}),
        ("q4_k_m", {GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0}),  # rows of 128 and 384 values
    ],
)
def test_types_of_weights(tmp_path: Path, dtype: str, types: set[GGMLQuantizationType]) -> None:
    flags = ("--dtype", dtype, "--check", 1)
    ended = export(tmp_path, *flags, vision=MODELS / "vision", kind="linear", visual_tokens="pool")
    assert ended.summary["pictures"] == 1
    reader = gguf.GGUFReader(tmp_path / "exported/model.gguf")
    assert {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) == 2} == types
    assert {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) == 1} == {
        GGMLQuantizationType.F32
    }


@pytest.mark.parametrize(("kind", "error"), [("Q4_K", 0.1), ("Q6_K", 0.03), ("Q8_0", 0.01)])
def test_quantised_numbers_are_near(kind: str, error: float) -> None:
    torch.manual_seed(0)
    data, wanted = torch.randn(3, 512), GGMLQuantizationType[kind]
    read = gguf.quants.dequantize(Tensor("w", data, fitting(wanted, 512)).encoded().reshape(3, -1), wanted)
    assert (torch.from_numpy(read.copy()) - data).norm() < error * data.norm()


def test_q4_k_m_gives_six_bits_where_llama_quantize_does(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "llama", template=LLAMA_TEMPLATE))
    _, _, tensors = language_model(llm, "q4_k_m")
    types = {tensor.name: tensor.type.name for tensor in tensors}  # rows of 32 and 48 values
    assert types["token_embd.weight"] == types["blk.1.attn_v.weight"] == "Q8_0"
    assert types["blk.0.attn_v.weight"] == "Q5_0"
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["output_norm.weight"] == "F32"
    assert "output.weight" not in types


def test_a_llama_whose_positions_are_scaled(tmp_path: Path) -> None:
    """Its rotary pairs lie elsewhere in a GGUF file, and factors of frequencies come with it."""
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 595, "max_position_embeddings": 1024, "eos_token_id": 2}
    rope = {"rope_scaling": scaled, "rope_theta": 10000.0}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **rope, initializer_range=0.2, tie_word_embeddings=True))
    llama.model.embed_tokens.weight.data[:261] = 0  # it says words, not bytes
    llama.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(LLM).save_pretrained(tmp_path / "llm")
    vision = write_encoder(tmp_path / "vision", "siglip")
    ended = export(tmp_path, vision=vision, llm_folder=tmp_path / "llm", kind="linear", visual_tokens="all")
    assert ended.summary["same_as_squares"] == 3
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "exported/model.gguf").tensors]
    assert "rope_freqs.weight" in names


def test_after_stage_2_its_weights_are_written(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path / "c", MODELS / "vision", LLM, "linear", "pool", None, "exact")
    checkpoint, llm = load_checkpoint(config.checkpoint), load_language_model(LLM)
    trained = llm.model.model.norm.weight
    trained.data += 1
    save_checkpoint(
        tmp_path / "tuned", checkpoint.projector, checkpoint.provenance, {}, {}, None, AllWeights(llm)
    )
    models = ("--checkpoint", tmp_path / "tuned", "--vision", MODELS / "vision", "--llm", LLM)
    call("llava_align", "export", "--to", "gguf", *models, "--out", tmp_path / "out", "--check", 0)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert torch.equal(torch.from_numpy(tensors["output_norm.weight"].data.copy()), trained.data)


@pytest.mark.parametrize(
    ("chosen", "flags", "code", "line"),
    [
        ({"kind": "mlp", "visual_tokens": "pool"}, (), 1, "cannot compute the visual tokens pool of this"),
        ({"kind": "linear", "visual_tokens": "pool", "layer": 1}, (), 1, "got linear of vision at layer 1"),
        ({"kind": "mlp3", "visual_tokens": "all"}, (), 1, "mlp3 projector is not made of one or two"),
        ({"kind": "linear", "visual_tokens": "all", "feature_norm": "layer"}, (), 1, "has one norm between"),
        ({"kind": "perceiver4", "visual_tokens": "all"}, (), 1, "has a perceiver projector, which no"),
        ({"kind": "linear", "visual_tokens": "all"}, ("--check", -1), 2, "--check; expected 0 or more"),
        ({"kind": "linear", "visual_tokens": "all"}, ("--to", "transformers", "--dtype", "q8_0"), 2,
         "--dtype of --to transformers; expected float32, bfloat16 or float16, or q8_0 with --to gguf"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, chosen: dict[str, Any], flags: tuple[object, ...], code: int, line: str
) -> None:
    assert line in export(tmp_path, *flags, code=code, vision=MODELS / "vision", **chosen).one_line()
    assert not (tmp_path / "exported").exists()


def test_other_language_models_are_refused(tmp_path: Path) -> None:
    llm = write_language_model(tmp_path / "llm", "gemma2", template=LLAMA_TEMPLATE)
    ended = export(
        tmp_path, code=1, vision=MODELS / "vision", llm_folder=llm, kind="linear", visual_tokens="all"
    )
    assert "llm cannot be written as GGUF here; expected llama, mistral, qwen2, qwen3" in ended.one_line()


def test_the_picture_comes_first_and_nothing_else_changes() -> None:
    llm = load_language_model(LLM)
    before = Conversation(llm.tokenizer, llm.eos_ids)
    dialogue = [
        {"role": "system", "content": "简短地回答。"},
        {"role": "user", "content": "图里有什么？"},
        {"role": "assistant", "content": "圆形"},
        {"role": "user", "content": "颜色呢？"},
    ]
    expected = [before.prompt(dialogue), before.prompt(dialogue[1:2])]
    marked = before.prompt([{"role": "user", "content": "a<__media_x1__>图里有什么？"}])
    llm.tokenizer.chat_template = PICTURE_FIRST.replace("@@@", llm.tokenizer.chat_template)
    after = Conversation(llm.tokenizer, llm.eos_ids)
    assert [after.prompt(dialogue), after.prompt(dialogue[1:2])] == expected
    hoisted = after.prompt([{"role": "user", "content": "a<__media_x1__>图里有什么？"}])
    text = llm.tokenizer.decode(marked).replace("<__media_x1__>", "")
    assert llm.tokenizer.decode(hoisted) == "<__media_x1__>" + text


def test_the_modelfile_says_what_the_chat_template_does() -> None:
    text = modelfile(load_language_model(LLM))
    assert text.startswith(
        'FROM ./model.gguf\nFROM ./mmproj.gguf\nTEMPLATE """{{ range .Messages }}{{ if .Images'
    )
    assert (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ range .Messages }}" in text
    )
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n' in text


@pytest.mark.parametrize(("to", "layer"), [("gguf", None), ("transformers", None), ("llava", -2)])
def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, to: str, layer: int | None) -> None:
    config = write_checkpoint(tmp_path / "c", MODELS / "vision", LLM, "linear", "all", layer, "exact")
    models = ("--checkpoint", config.checkpoint, "--vision", config.vision, "--llm", config.llm)
    with largest_file(1 << 20):
        ended = call("llava_align", "export", "--to", to, *models, "--out", tmp_path / "out", code=1)
    *_, line = ended.err.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path / 'out'}; got ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_folder_that_another_made_is_left_alone(tmp_path: Path) -> None:
    """Only what a killed export left, which is known by its lock, is written anew."""
    chosen: dict[str, Any] = {"kind": "linear", "visual_tokens": "pool", "vision": MODELS / "vision"}
    (tmp_path / "exported.part").mkdir()
    (tmp_path / "exported.part/mine").touch()
    *_, line = export(tmp_path, "--check", 0, code=1, **chosen).err.splitlines()
    assert f"{tmp_path}/exported.part is there already" in line
    assert [path.name for path in (tmp_path / "exported.part").iterdir()] == ["mine"]
    (tmp_path / "exported.lock").touch()
    with Lock(tmp_path / "exported"):
        assert "exported is being written" in export(tmp_path, "--check", 0, code=1, **chosen).err
    (tmp_path / "exported.lock").touch()
    export(tmp_path, "--check", 0, **chosen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "exported"]


def test_pictures_that_cannot_be_read_are_no_agreement(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.jpg").write_bytes(b"no picture")
    chosen: dict[str, Any] = {"kind": "linear", "visual_tokens": "pool", "vision": MODELS / "vision"}
    ended = export(tmp_path, "--check-images", tmp_path / "pictures", code=1, **chosen)
    assert "error: nothing was compared; got no image that can be read" in ended.err


def test_llama_cpp_that_ends_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj.gguf").write_bytes(b"GGUF")
    with llama_cpp(tmp_path, 64) as ask, pytest.raises(LlavaError, match=r"cannot answer with .*exit code"):
        ask(b"", "?", 4)
