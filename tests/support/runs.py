"""Small data for `train`, short runs on it, and what they leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava_core.filesystem import read_json_lines, sha256_files
from llava_core.sha256sums import read_sums, write_sums
from tests.support.language_models import write_language_model
from tests.support.paths import GOLDEN
from tests.support.shards import write_shard
from train.config import RunConfig

LOSS_CURVE = GOLDEN / "loss_curve.json"


def write_runs(root: Path) -> Path:
    """Two training shards with failed rows, a held-out one, a small language model."""
    write_shard(root / "features/a.h5", rows=26, failed=[3, 9])
    write_shard(root / "features/b.h5", rows=25, failed=[0], seed=1)
    write_shard(root / "held-out/c.h5", rows=10, seed=2)
    write_language_model(root / "llm")
    return root


def config(world: Path, out: Path, **flags: Any) -> RunConfig:
    given = RunConfig(
        features=world / "features",
        eval_features=world / "held-out",
        llm=world / "llm",
        out=out,
        batch_size=4,
        epochs=2,
        lr=0.02,
        eval_every=10,
        save_every=10,
        log_every=1,
        device="cpu",
        instructions="mixed",  # of the golden curve, which is older than the choice
    )
    return dataclasses.replace(given, **flags)


def flags_of(given: RunConfig) -> list[str]:
    flags: list[str] = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if value != field.default and not isinstance(value, bool):
            values = value if isinstance(value, tuple) else [value]
            flags += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return flags


def curve(out: Path, key: str = "loss") -> dict[int, float]:
    lines = read_json_lines(out / "metrics.jsonl")
    return {line["step"]: line[key] for line in lines if key in line}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "last/model.safetensors")


def edited(checkpoint: Path) -> None:
    """Say in SHA256SUMS that its files are meant to be as they are now."""
    write_sums(checkpoint, {name: sha256_files([checkpoint / name]) for name in read_sums(checkpoint)})
