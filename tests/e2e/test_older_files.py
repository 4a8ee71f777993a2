"""Files that earlier versions wrote still load: shards, a shard half written, a checkpoint, a killed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.shards.reader import Shard
from tests.support.commands import call
from tests.support.paths import GOLDEN, WORLD_MODELS

FILES = GOLDEN / "version_1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files as the working folder, with the models where the recorded settings name them."""
    shutil.copytree(FILES, tmp_path / "old", symlinks=True)
    (tmp_path / "old/models").symlink_to(WORLD_MODELS)
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_shards_and_a_checkpoint_of_version_1(old: Path) -> None:
    for cache, rows in (("features", 12), ("held-out", 6)):
        checked = call("extract", "verify", "--out", cache, "--vision", "models/vision", "--json")
        assert checked.summary["rows"] == rows
    scored = call(
        *("train", "eval", "--checkpoint", "checkpoint", "--features", "held-out", "--llm", "models/llm"),
        *("--device", "cpu", "--json"),
    )
    recorded = json.loads((old / "checkpoint/metrics.json").read_text())
    assert scored.summary["loss"] == pytest.approx(recorded["eval_loss"], abs=1e-4)


def test_a_shard_half_written_by_version_1_is_finished(old: Path) -> None:
    flags = ("--data", "pictures", "--vision", "models/vision", "--out", "part", "--json")
    assert call("extract", "run", *flags).summary["rows"] == 6
    assert call("extract", "verify", "--out", "part", "--json").summary["damaged_rows"] == 0


def test_shards_of_version_2_have_no_reasons_and_are_finished(old: Path) -> None:
    shutil.copytree(GOLDEN / "version_2", old / "two")
    where = ("--data", "pictures", "--vision", "models/vision", "--device", "cpu")
    for folder in ("two/features", "two/part"):
        kept = call("extract", "run", *where, "--out", folder, "--dtype", "int8", "--json")
        assert (kept.summary["ok"], kept.summary["by_reason"]) == (6, {})
        checked = call("extract", "verify", "--out", folder, *where, "--json").summary
        assert (checked["damaged_rows"], checked["encoded_again"]) == (0, 6)
    shards = [Shard(old / "two" / folder / "pictures.h5") for folder in ("features", "part")]
    assert [shard.layout.version for shard in shards] == [2, 2]
    assert (shards[0].checksums == shards[1].checksums).all()
    assert call("extract", "inspect", "--out", "two/part", "--json").summary["by_reason"] == {}


def test_a_run_killed_under_version_1_goes_on(old: Path) -> None:
    flags = ("--features", "features", "--eval-features", "held-out", "--llm", "models/llm",
             "--device", "cpu", "--batch-size", 4, "--epochs", 4, "--max-steps", 4, "--eval-every", 2,
             "--save-every", 2, "--log-every", 1)  # fmt: skip
    call("train", "run", *flags, "--out", "killed", "--resume")
    expected, got = (load_file(old / of / "model.safetensors") for of in ("checkpoint", "killed/last"))
    for key, weights in expected.items():
        torch.testing.assert_close(got[key], weights, atol=1e-5, rtol=1e-4)
