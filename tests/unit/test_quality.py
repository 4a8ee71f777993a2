"""What benchmarks/quality.py does beyond the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.quality import Whitened
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.projector.projector import build_projector
from llava_core.shards.folder import open_shards
from tests.support.language_models import write_language_model
from tests.support.shards import WIDTH, write_shard
from train.data.samples import Samples


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_whitening_and_folding_leave_the_function_as_it_was(kind: str, tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm"))
    write_shard(tmp_path / "features/a.h5", rows=40)
    conversation = Conversation(llm.tokenizer, llm.eos_ids)
    samples = Samples(open_shards(tmp_path / "features"), conversation, 64, 1000, seed=0)
    projector = build_projector(kind, WIDTH, llm.hidden)
    features = samples.read(range(len(samples))).float()
    before = projector(features)
    whitened = Whitened(projector, samples, torch.device("cpu"))
    assert torch.allclose(whitened(features), before, atol=1e-5)
    seen = ((features - whitened.mean) @ whitened.matrix).flatten(0, 1)
    assert torch.allclose(seen.T @ seen / len(seen), torch.eye(WIDTH), atol=0.05)
    whitened.layer.weight.add_(torch.randn_like(whitened.layer.weight))  # as training does
    trained = whitened(features)
    assert (trained - before).abs().max() > 0.1
    whitened.fold()
    assert torch.allclose(projector(features), trained, atol=1e-5 * trained.abs().max().item())
