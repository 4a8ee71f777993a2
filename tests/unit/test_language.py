from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import modeling_gguf_pytorch_utils

from llava_core.errors import LlavaError
from llava_core.language import LanguageModel, load_language_model, no_gguf_bar, outline_language_model
from tests.small_models import write_language_model


def test_frozen_and_known(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "small-qwen"))
    assert not llm.model.training
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert llm.identity.id == "small-qwen"
    assert llm.identity.architecture == "Qwen3ForCausalLM"
    assert llm.hidden == 32
    assert llm.eos_ids == {2}
    assert llm.embed(torch.tensor([[1, 2, 3]])).shape == (1, 3, 32)
    assert llm.embedding_rms == pytest.approx(llm.embedding.weight.pow(2).mean().sqrt().item())


def test_the_identity_follows_the_weights(tmp_path: Path) -> None:
    hashes = {
        load_language_model(write_language_model(tmp_path / str(i), seed=seed)).identity.weights_sha256
        for i, seed in enumerate([0, 0, 1])
    }
    assert len(hashes) == 2


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no language model folder"):
        load_language_model(tmp_path / "nowhere")


def test_folder_without_weights(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LlavaError, match="no weights"):
        load_language_model(folder)


@pytest.mark.parametrize("load", [load_language_model, outline_language_model])
def test_folders_of_something_else(tmp_path: Path, load: Callable[[Path], LanguageModel]) -> None:
    with pytest.raises(LlavaError, match=r"holds no language model; .*; got an empty folder"):
        load(tmp_path)
    (tmp_path / "vision_model_config.json").touch()
    with pytest.raises(LlavaError, match=r"got vision_model_config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(LlavaError, match="got model_type siglip_vision_model"):
        load(tmp_path)


def test_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no chat template"):
        load_language_model(write_language_model(tmp_path / "llm", template=None))


def test_bf16_leaves_the_rotary_frequencies_alone(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    half, whole = (load_language_model(folder, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.dtype == torch.bfloat16
    assert half.head.dtype == torch.bfloat16
    for (name, ours), (_, exact) in zip(half.model.named_buffers(), whole.model.named_buffers(), strict=True):
        assert torch.equal(ours, exact), name


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_weights_that_were_not_downloaded(tmp_path: Path, content: bytes) -> None:
    folder = write_language_model(tmp_path / "llm")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(LlavaError, match="cannot load the language model"):
        load_language_model(folder)


def test_weights_that_lack_a_layer(tmp_path: Path) -> None:
    folder = write_language_model(tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LlavaError, match=r"not whole; got no model\.layers\.2\."):
        load_language_model(folder)


def test_the_bar_of_gguf_files_is_silent_and_its_errors_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a tensor"), no_gguf_bar():
        list(modeling_gguf_pytorch_utils.tqdm(map(int, ("1", "a tensor")), desc="Converting"))
    assert capsys.readouterr().err == ""
    list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="Converting"))
    assert "Converting" in capsys.readouterr().err
