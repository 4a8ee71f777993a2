from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import modeling_gguf_pytorch_utils

from infer.chat.dialogue import Dialogue
from llava_core.errors import LlavaError
from llava_core.language.compiled_decode import CompiledStep
from llava_core.language.generate import generate
from llava_core.language.load import load_language_model, no_gguf_bar, outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.language.sampling import Sampling
from tests.support.language_models import LLAMA_TEMPLATE, write_language_model


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
    with pytest.raises(LlavaError, match=r"no language model folder .*`llava download models`"):
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


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "gemma2", "gemma3_text"])
def test_the_scale_of_embeddings_is_that_of_what_the_model_is_given(tmp_path: Path, kind: str) -> None:
    """Visual tokens start at it, so a factor that `embed` leaves out would make them too faint."""
    folder = write_language_model(tmp_path / "llm", kind)
    llm = load_language_model(folder)
    embedded, weight = llm.embed(torch.arange(264)), llm.embedding.weight
    assert llm.embedding_rms == pytest.approx(embedded.pow(2).mean().sqrt().item(), rel=1e-3)
    assert llm.embedding_scale == pytest.approx((embedded.norm() / weight.norm()).item(), rel=1e-3)
    assert llm.embedding_scale == (1.0 if kind == "qwen3" else pytest.approx(math.sqrt(32), rel=1e-3))
    assert outline_language_model(folder).embedding_scale == llm.embedding_scale
    half = load_language_model(folder, dtype=torch.bfloat16)
    assert half.embedding_scale == llm.embedding_scale
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(llm.model(inputs_embeds=llm.embed(ids)).logits, llm.model(input_ids=ids).logits)


def test_a_model_that_reads_more_than_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="Gemma3nForCausalLM cannot read visual tokens"):
        load_language_model(write_language_model(tmp_path / "llm", "gemma3n_text"))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "lfm2", "qwen3_next"])
def test_every_turn_of_a_dialogue_is_answered_as_if_it_were_the_first(tmp_path: Path, kind: str) -> None:
    """Whatever the layers keep of what they read."""
    llm = load_language_model(write_language_model(tmp_path / "llm", kind, template=LLAMA_TEMPLATE))
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    talk, sampling = Dialogue(llm, conversation, Sampling(max_tokens=6)), Sampling(max_tokens=6)
    visual = torch.randn(1, 4, llm.hidden, generator=torch.Generator().manual_seed(0))
    talk.begin(visual)
    for question in ("看", "what else?"):
        answer = "".join(talk.ask(question))
        prompt = conversation.prompt(talk.messages[:-1])
        embedded = torch.cat([visual, llm.embed(torch.tensor([prompt]))], dim=1)
        ids = list(prompt)
        for _ in range(6):  # without a cache
            with torch.inference_mode():
                token = int(llm.model(inputs_embeds=embedded, use_cache=False).logits[0, -1].argmax())
            if token in llm.eos_ids:
                break
            ids.append(token)
            embedded = torch.cat([embedded, llm.embed(torch.tensor([[token]]))], dim=1)
        assert answer == conversation.text(ids[len(prompt) :])
    again = [step[0] for step in generate(llm, embedded[:, : 4 + len(prompt)], sampling)]
    assert [*prompt, *again] == ids


def test_a_model_that_keeps_no_cache_is_refused(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "mamba"))
    with pytest.raises(
        LlavaError, match=r"cannot generate with a MambaForCausalLM; expected .*linear_attention"
    ):
        llm.new_cache()


def test_only_layers_of_attention_are_compiled(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm", "lfm2"))
    with pytest.raises(LlavaError, match="got conv, full_attention; leave out --compile"):
        CompiledStep(llm)


@pytest.mark.parametrize("load", [load_language_model, outline_language_model])
@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "compressed-tensors"])
def test_quantised_weights_are_refused(
    tmp_path: Path, load: Callable[[Path], LanguageModel], method: str
) -> None:
    folder = write_language_model(tmp_path / "llm")
    edit(folder / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(LlavaError, match=f"quantised; .* got {method}; use the folder that the model was"):
        load(folder)


@pytest.mark.parametrize("load", [load_language_model, outline_language_model])
def test_a_folder_s_own_code_is_neither_run_nor_asked_about(
    tmp_path: Path, load: Callable[[Path], LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", asked)
    known = write_language_model(tmp_path / "known")
    for file in ("config.json", "tokenizer_config.json"):
        code = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
        edit(known / file, auto_map=code)
    (known / "own.py").write_text("raise SystemExit('run')")
    assert load(known).identity.architecture == "Qwen3ForCausalLM"  # transformers' own

    edit(known / "config.json", model_type="baichuan")
    with pytest.raises(LlavaError, match=r"code of its own, which is not run; .* GGUF file, or another"):
        load(known)


def edit(path: Path, **settings: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
