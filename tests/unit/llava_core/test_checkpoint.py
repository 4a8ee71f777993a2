from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity, LanguageModelIdentity
from llava_core.projector.checkpoint import Provenance, load_checkpoint, load_state, point_to, save_checkpoint
from llava_core.projector.projector import build_projector
from llava_core.registry import VISUAL_TOKENS
from llava_core.sha256sums import SUMS, read_sums

ENCODER = {"model_id": "clip", "weights_sha256": "a" * 64, "layer": None, "tokens": 5, "width": 6}
PREPROCESS = {"size": 32, "filter": "bicubic"}
LANGUAGE = LanguageModelIdentity("qwen", "b" * 64, hidden=8, rendered=("1 a", "2 b"))
PROVENANCE = Provenance(EncoderIdentity(ENCODER, PREPROCESS), LANGUAGE)


KINDS = (*itertools.product(("linear", "mlp"), VISUAL_TOKENS.builtins, ("none", "layer", "center")),
         *((kind, "all", "center") for kind in ("mlp3x9", "lowrank2", "perceiver3", "tokenpacker", "ldp")),
         ("cabstractor4x1", "patches", "layer"))  # fmt: skip


def save(
    folder: Path, kind: str = "mlp", step: int = 1, visual_tokens: str = "all", feature_norm: str = "none"
) -> torch.nn.Module:
    torch.manual_seed(step)
    projector = build_projector(kind, 6, 8, visual_tokens, feature_norm=feature_norm)
    for measured in projector.buffers():
        measured.normal_()
    state = {"step": step, "rng": torch.get_rng_state()}
    save_checkpoint(folder, projector, PROVENANCE, {"lr": 0.1}, {"eval_loss": 2.5}, state)
    return projector


@pytest.mark.parametrize(("kind", "visual_tokens", "feature_norm"), KINDS)
def test_round_trip(tmp_path: Path, kind: str, visual_tokens: str, feature_norm: str) -> None:
    projector = save(tmp_path / "c", kind, 1, visual_tokens, feature_norm).requires_grad_(False)
    loaded = load_checkpoint(tmp_path / "c")
    x = torch.randn(3, 5, 6)
    assert torch.equal(loaded.projector(x), projector(x))
    assert not any(p.requires_grad for p in loaded.projector.parameters())
    assert loaded.provenance == PROVENANCE
    assert (loaded.training, loaded.metrics) == ({"lr": 0.1}, {"eval_loss": 2.5})
    assert load_state(tmp_path / "c")["step"] == 1
    card = (tmp_path / "c/README.md").read_text(encoding="utf-8")
    assert PROVENANCE.encoder.fingerprint in card
    assert "| eval_loss | 2.5 |" in card
    # whoever may read the one may read the other
    assert (tmp_path / "c/model.safetensors").stat().st_mode == (tmp_path / "c/config.json").stat().st_mode


def test_a_checkpoint_from_before_there_was_a_choice_of_tokens(tmp_path: Path) -> None:
    projector = save(tmp_path / "c", "linear")
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["projector"].pop("visual_tokens") == "all"
    (tmp_path / "c/config.json").write_text(json.dumps({**config, "version": 1}))
    (tmp_path / "c/SHA256SUMS").unlink()
    assert set(load_file(tmp_path / "c/model.safetensors")) == {"weight", "bias"}
    x = torch.randn(3, 5, 6)
    assert torch.equal(load_checkpoint(tmp_path / "c").projector(x), projector(x))


def test_an_older_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    save(tmp_path / "c", step=1)
    (tmp_path / "c.part").mkdir()
    (tmp_path / "c.part/leftover").touch()
    save(tmp_path / "c", step=2)
    assert load_state(tmp_path / "c")["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not (tmp_path / "c/leftover").exists()


def test_other_models_are_refused_by_name() -> None:
    other = dataclasses.replace(LANGUAGE, id="llama", weights_sha256="c" * 64)
    with pytest.raises(LlavaError, match=r"expected qwen \(weights bbbb.*got llama \(weights cccc"):
        PROVENANCE.require_language_model(other)
    PROVENANCE.require_language_model(dataclasses.replace(LANGUAGE, id="the same in another folder"))
    larger = EncoderIdentity(ENCODER, {**PREPROCESS, "size": 64})
    with pytest.raises(LlavaError, match=r"expected clip \(.*got clip \(.*size: 32 vs 64"):
        PROVENANCE.require_encoder(larger)
    renamed = EncoderIdentity({**ENCODER, "model_id": "the same in another folder"}, PREPROCESS)
    PROVENANCE.require_encoder(renamed)
    inner = EncoderIdentity({**ENCODER, "layer": 3}, PREPROCESS)
    with pytest.raises(LlavaError, match=r"make features as it was trained on: extract run without --layer$"):
        PROVENANCE.require_encoder(inner)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training_config.yaml", "metrics.json"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c")
    file = tmp_path / "c" / name
    file.write_bytes(
        file.read_bytes()[: file.stat().st_size // 2] if name != "training_config.yaml" else b"a: ["
    )
    with pytest.raises(LlavaError, match=f"{name} is damaged, or was edited|damaged checkpoint"):
        load_checkpoint(tmp_path / "c")
    file.unlink()
    with pytest.raises(LlavaError, match="checkpoint"):
        load_checkpoint(tmp_path / "c")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps({**config, "version": 5}))
    with pytest.raises(LlavaError, match=r"expected llava-projector version 1, 2, 3 or 4; got .* version 5"):
        load_checkpoint(tmp_path / "c")


def test_links_are_relative_and_replaced(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"step-{step}", step=step)
        point_to(tmp_path / "last", tmp_path / f"step-{step}")
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert load_state(moved / "last")["step"] == 2


def test_every_byte_but_the_card_s_is_checked(tmp_path: Path) -> None:
    save(tmp_path / "c")
    for name in (
        "model.safetensors",
        "config.json",
        "training_config.yaml",
        "metrics.json",
        "state.pt",
        SUMS,
    ):
        path = tmp_path / "c" / name
        whole = path.read_bytes()
        for place in random.Random(0).sample(range(len(whole)), min(25, len(whole))):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(LlavaError):
                load_checkpoint(tmp_path / "c"), load_state(tmp_path / "c")
        path.unlink()
        with pytest.raises(LlavaError):
            load_checkpoint(tmp_path / "c"), load_state(tmp_path / "c")
        path.write_bytes(whole)
    (tmp_path / "c/README.md").write_text("mine")
    load_checkpoint(tmp_path / "c"), load_state(tmp_path / "c")


def test_an_edited_file_is_taken_as_the_message_says(tmp_path: Path) -> None:
    save(tmp_path / "c")
    (tmp_path / "c/training_config.yaml").write_text("lr: 0.2")
    told = "put the line that `sha256sum training_config.yaml` prints into SHA256SUMS"
    with pytest.raises(LlavaError, match=re.escape(told)):
        load_checkpoint(tmp_path / "c")
    sums = read_sums(tmp_path / "c")
    printed = hashlib.sha256((tmp_path / "c/training_config.yaml").read_bytes()).hexdigest()
    text = (tmp_path / "c" / SUMS).read_text().replace(sums["training_config.yaml"], printed)
    (tmp_path / "c" / SUMS).write_text(text)
    assert load_checkpoint(tmp_path / "c").training == {"lr": 0.2}
    (tmp_path / "c/state.pt").unlink()  # as `llava push` leaves it out
    load_checkpoint(tmp_path / "c")


def test_a_write_that_puts_down_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: write(path, bytes(len(data))))
    with pytest.raises(LlavaError, match="is damaged"):
        save(tmp_path / "c")
    assert not (tmp_path / "c").exists()
