"""The projector before the first step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.prompt_and_labels import Conversation
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import build_projector, last_linear
from llava_core.shards.folder import open_shards
from tests.support.language_models import write_language_model
from tests.support.shards import WIDTH, write_shard
from train import initialization as start
from train.config import RunConfig
from train.data.samples import Samples

KINDS = ("linear", "mlp", "mlp3x9", "lowrank4", "perceiver3x1", "cabstractor4x1", "ldp", "tokenpacker")
"""One of each kind, for a grid of 2x2 patches."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(write_language_model(tmp_path_factory.mktemp("llm")))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, llm: LanguageModel) -> Samples:
    shard = write_shard(tmp_path_factory.mktemp("features") / "a.h5", rows=50, failed=[7])
    return Samples(open_shards(shard.parent), Conversation(llm.tokenizer, llm.eos_ids), 64, 1000, seed=0)


def config(**flags: object) -> RunConfig:
    return RunConfig(features=Path(), llm=Path(), out=Path(), **flags)  # type: ignore[arg-type]


def numpy_ridge(x: np.ndarray, y: np.ndarray, share: float) -> np.ndarray:
    """[H, D] by least squares with rows added for the penalty: another road to the same weights."""
    x, y = x - x.mean(0), y - y.mean(0)
    width = x.shape[1]
    penalty = np.sqrt(share * (x**2).sum() / width) * np.eye(width)
    solved = np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([y, np.zeros((width, y.shape[1]))]), None)
    weight: np.ndarray = solved[0].T
    return weight


def test_moments_of_batches_give_the_ridge_of_all() -> None:
    """With features far from 0, as those of a real encoder are."""
    rng = np.random.default_rng(0)
    x = 100 + rng.normal(size=(30, 6, 8)) @ rng.normal(size=(8, 8))
    y = rng.normal(size=(30, 5)) + x.mean(1) @ rng.normal(size=(8, 5))
    moments = start.Moments()
    for rows in np.split(np.arange(30), [7, 20]):
        moments.add(torch.tensor(x[rows]).float(), torch.tensor(y[rows]).float())
    flat, beside = x.reshape(-1, 8), np.repeat(y, 6, axis=0)
    for share in (1e-3, 1.0):
        weight = numpy_ridge(flat, beside, share)
        assert moments.ridge(share).numpy() == pytest.approx(weight, rel=1e-3, abs=1e-4)
        spread = ((flat - flat.mean(0)) @ weight.T).std(0)
        assert moments.spread(moments.ridge(share)) == pytest.approx(np.sqrt((spread**2).mean()), rel=1e-3)
    assert moments.x_mean.numpy() == pytest.approx(flat.mean(0), rel=1e-6)
    assert moments.y_mean.numpy() == pytest.approx(beside.mean(0), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("feature_norm", ["none", "center"])
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_what_visual_tokens_say(
    kind: str, feature_norm: str, samples: Samples, llm: LanguageModel
) -> None:
    given = config(start="captions", projector=kind, feature_norm=feature_norm)
    projector = start.initial_projector(given, samples, llm)
    torch.manual_seed(0)
    untouched = build_projector(kind, WIDTH, llm.hidden)
    features = samples.read(range(len(samples))).float()
    shown = features - features.mean((0, 1)) if feature_norm == "center" else features
    inputs = start.layer_input(untouched, last_linear(untouched), shown)
    said = []
    for index in range(len(samples)):
        answer = [label for label in samples.example(index, 0).labels if label >= 0]
        said.append(llm.embedding.weight[answer].mean(0))
    x, y = (
        inputs.flatten(0, 1).numpy(),
        torch.stack(said).numpy().repeat(projector.tokens_out(samples.tokens), axis=0),
    )
    fit = (x - x.mean(0)) @ numpy_ridge(x, y, start.RIDGE).T
    loud = fit * start.OUTPUT_RMS_RATIO * llm.embedding_rms / np.sqrt((fit**2).mean())
    projected = projector(features).flatten(0, 1).numpy()
    assert projected == pytest.approx(loud + y.mean(0), rel=1e-2, abs=2e-3)


def test_a_single_caption_is_said_by_every_token(
    samples: Samples, llm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "CAPTION_SAMPLES", 1)
    projector = start.initial_projector(config(start="captions"), samples, llm)
    solved = dict(projector.map.named_parameters())
    assert not solved["weight"].any()
    assert torch.allclose(solved["bias"], start.caption_embedding(samples, 0, llm), atol=1e-6)


def test_the_courses_start_is_torchs_own(samples: Samples, llm: LanguageModel) -> None:
    projector = start.initial_projector(config(start="torch", seed=3), samples, llm)
    torch.manual_seed(3)
    layer = torch.nn.Linear(WIDTH, llm.hidden)
    assert torch.equal(projector.map.weight, layer.weight)  # type: ignore[arg-type]
    assert torch.equal(projector.map.bias, layer.bias)  # type: ignore[arg-type]


def test_the_default_start_has_the_scale_of_the_embeddings(samples: Samples, llm: LanguageModel) -> None:
    projector = start.initial_projector(config(), samples, llm)
    with torch.no_grad():
        projected = projector(samples.read(range(len(samples))).float())
    assert projected.pow(2).mean().sqrt().item() == pytest.approx(llm.embedding_rms, rel=1e-4)


def test_a_kept_projector_goes_on(llm: LanguageModel, samples: Samples, tmp_path: Path) -> None:
    shard = samples.shards[0]
    provenance = Provenance(shard.identity, llm.identity)
    kept = build_projector("mlp", WIDTH, llm.hidden)
    save_checkpoint(tmp_path / "kept", kept, provenance, {}, {}, state=None)
    features = samples.read(range(3)).float()
    projector = start.initial_projector(config(init=tmp_path / "kept", projector="mlp"), samples, llm)
    assert torch.equal(projector(features), kept(features))
    assert all(parameter.requires_grad for parameter in projector.parameters())
    with pytest.raises(
        LlavaError, match="got mlp, visual tokens all; give --projector mlp --visual-tokens all"
    ):
        start.initial_projector(config(init=tmp_path / "kept"), samples, llm)


def test_a_kept_projector_of_other_models_is_refused(
    llm: LanguageModel, samples: Samples, tmp_path: Path
) -> None:
    shard = samples.shards[0]
    smaller = EncoderIdentity(shard.encoder, {**shard.preprocess, "size": 1})
    for name, provenance in (
        ("encoder", Provenance(smaller, llm.identity)),
        ("llm", Provenance(shard.identity, dataclasses.replace(llm.identity, weights_sha256="0" * 64))),
    ):
        kept = build_projector("linear", WIDTH, llm.hidden)
        save_checkpoint(tmp_path / name, kept, provenance, {}, {}, state=None)
        with pytest.raises(LlavaError, match="this projector was trained"):
            start.initial_projector(config(init=tmp_path / name), samples, llm)
