"""What a plan says of memory, against what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_core.cli.console import human_seconds
from llava_core.language.load import load_language_model
from llava_core.projector.projector import build_projector
from tests.support.language_models import write_language_model
from tests.support.loss import summed_loss
from tests.unit.train.test_loss import WIDTH, a_batch
from train.cost_prediction import activation_bytes
from train.data.packing import pack
from train.model.packed_model import prepare


def test_activations_are_those_that_autograd_keeps(tmp_path: Path) -> None:
    llm = load_language_model(write_language_model(tmp_path / "llm"))
    prepare(llm)
    batch = a_batch(llm)
    packed = pack(batch.features, batch.features.shape[1], batch.examples)
    weights = {p.untyped_storage().data_ptr() for p in llm.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(llm, build_projector("linear", WIDTH, llm.hidden), packed)
    assert loss.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values())
    predicted = activation_bytes(llm.model.config, torch.float32) * len(packed.ids)
    assert predicted == pytest.approx(measured, rel=1 / 3)


def test_times_are_read_in_units_of_people() -> None:
    assert [human_seconds(s) for s in (9.5, 90, 5400, 400_000)] == ["9.5 s", "1.5 min", "1.5 h", "4.6 days"]
