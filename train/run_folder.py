"""The folder of a run: its flags, its checkpoints, and how far it is.

training_config.yaml   the flags, written once
metrics.jsonl          metrics, one JSON object a line
held_out.npz           held-out losses of the last evaluation, by picture: what a sweep compares
choices.npz            its forced choices, by row, where a sweep asked for them
step-00000500/ ...     checkpoints (llava_core.projector.checkpoint)
last, best             links to two of them
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.filesystem import replace_text, require_folder, sha256_files
from llava_core.language.tuned_weights import TunedWeights
from llava_core.projector.aligned import load_aligned
from llava_core.projector.checkpoint import (
    Provenance,
    load_checkpoint,
    load_state,
    point_to,
    save_checkpoint,
)
from llava_core.projector.projector import Projector
from llava_core.types import JsonDict
from train.config import ALL_ROWS, RunConfig
from train.flags import BEFORE, DEFAULTS, FREE_KEYS, MOVABLE_KEYS, OLD_INSTRUCTIONS, plain

Config = TypeVar("Config", bound=RunConfig)
UNREADABLE = (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile)
"""What reading an .npz raises that is damaged, or of an earlier version."""


def as_begun(config: Config) -> Config:
    """The flags, with `mixed` instructions if the run or sweep in OUT began before there were others."""
    if config.instructions != DEFAULTS["instructions"]:
        return config
    for name in ("last/training_config.yaml", "training_config.yaml", "sweep.yaml"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
            recorded = yaml.safe_load((config.out / name).read_text(encoding="utf-8"))
            if "instructions" in {*recorded, *recorded.get("flags", ()), *recorded.get("space", ())}:
                return config
            say(f"{config.out} began with --instructions {OLD_INSTRUCTIONS}, and continues with them")
            return dataclasses.replace(config, instructions=OLD_INSTRUCTIONS)
    return config


def moved_of(before: JsonDict, now: JsonDict) -> set[str]:
    """Which of MOVABLE_KEYS are folders in both, by different names."""
    both = {key for key in MOVABLE_KEYS if before.get(key) is not None and now.get(key) is not None}
    return {key for key in both if before[key] != now[key]}


def weights_sha256(checkpoint: Path | None) -> str | None:
    """sha256 of a checkpoint's weights, the language model's included; None without one, or if it is gone."""
    if not checkpoint or not (checkpoint / "model.safetensors").is_file():
        return None
    return sha256_files([checkpoint / "model.safetensors", *sorted(checkpoint.glob("*/*.safetensors"))])


def _flag(key: str) -> str:
    return key.replace("_", "-")


class RunFolder:
    """The folder of one run; its flags are compared with those that the run began with.

    Raises LlavaError if it holds a run with other flags, or none although --resume was given.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path, self.config = path, config
        self.training: JsonDict = {key: plain(value) for key, value in dataclasses.asdict(config).items()}
        self.moved: set[str] = set()
        """Folders that have another name than when the run began."""
        require_folder(path)
        if (path / "config.json").exists():
            raise LlavaError(f"--out {path} is a checkpoint", do="choose another; --init starts from it")
        last, left = path / "last", sorted(path.glob("step-????????"))
        if last.is_symlink() and not last.exists() and left:
            do = f"choose another --out, or go on from one that is left: ln -sfn {left[-1].name} {last}"
            raise LlavaError(f"{last} points to {last.readlink()}, which is gone", do=do)
        if self.begun:
            self._require_same_flags(load_checkpoint(last).training)
        elif (path / "summary.json").exists():  # finished, and its checkpoints deleted
            self._require_same_flags(yaml.safe_load((path / "training_config.yaml").read_text("utf-8")))
            if self.moved:
                what = f"{path} has no checkpoint left to compare --{_flag(min(self.moved))} with"
                raise LlavaError(what, do="name the folder as before, or choose another --out")
        elif config.resume:
            raise LlavaError(f"no run to resume in {path}", do="leave out --resume, or correct --out")

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.path / "last"

    @property
    def begun(self) -> bool:
        """Whether there is one."""
        return self.last.exists()

    def _require_same_flags(self, flags: JsonDict) -> None:
        before = {**BEFORE, **flags}
        differing = [k for k in self.training if k not in FREE_KEYS and before[k] != self.training[k]]
        self.moved = moved_of(before, self.training) & set(differing)
        if left := [key for key in differing if key not in self.moved]:
            raise self._another(left[0], before[left[0]])

    def _another(self, key: str, before: object, now: object = None) -> LlavaError:
        return LlavaError(
            f"{self.path} holds a run with another --{_flag(key)}",
            expected=before,
            got=self.training[key] if now is None else now,
            do="choose another --out, or delete that folder",
        )

    def begin(self) -> None:
        """Write the flags."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.training, allow_unicode=True, sort_keys=False)
        replace_text(self.path / "training_config.yaml", text)

    def keep_held_out(self, sums: np.ndarray, rows: str, pictures: str) -> None:
        """Write Evaluation.sums, and which rows they are of, and which pictures, by any encoder."""
        losses, tokens = sums[:, 0].astype("<f4"), sums[:, 2].astype("<u4")
        self._keep("held_out", rows=np.array(rows), pictures=np.array(pictures), loss=losses, tokens=tokens)

    def keep_choices(self, right: Sequence[bool], shuffled: Sequence[bool], pictures: Sequence[int]) -> None:
        """Write which rows' choices were right, with their pictures and with others, and the pictures."""
        self._keep("choices", right=right, shuffled=shuffled, pictures=pictures)

    def _keep(self, name: str, **arrays: Any) -> None:
        partial = self.path / f"{name}.npz.part"
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(self.path / f"{name}.npz")

    def finished(self) -> JsonDict | None:
        """The summary of a run that reached its last step."""
        path = self.path / "summary.json"
        if not path.exists():
            return None
        try:
            summary: JsonDict = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise LlavaError(
                f"{path} is damaged", do="delete it; the run continues from its last checkpoint"
            ) from None
        return summary

    def finish(self, summary: JsonDict) -> None:
        replace_text(self.path / "summary.json", json.dumps(summary) + "\n")

    def resume(self, provenance: Provenance, rows: JsonDict) -> dict[str, Any] | None:
        """State of the last checkpoint, `projector` weights and `config` included; None for a new run.

        Raises LlavaError if the encoder, the language model or the `rows` have changed since, or --init names
        another folder with another projector in it.
        """
        if not self.begun:
            return None
        checkpoint = load_aligned(self.last, provenance)
        state = load_state(checkpoint.folder)
        lists = [each.get("row_list", "") for each in (state["rows"], rows)]
        if lists[0] != lists[1]:
            names = checkpoint.training.get("rows", ALL_ROWS), self.config.rows
            shown = (f"{name} {own[:12]}".strip() for name, own in zip(names, lists, strict=True))
            raise self._another("rows", *shown)
        if state["rows"] != rows:
            raise LlavaError(
                f"the shards have changed since the run in {self.path} began: files or rows were added",
                do="restore them, or train again in another --out",
            )
        if "init" in self.moved and weights_sha256(self.config.init) != state.get("init"):
            raise self._another("init", checkpoint.training.get("init"))
        projector = checkpoint.projector
        return {**state, "config": projector.config, "projector": projector.state_dict()}

    def save(
        self,
        step: int,
        projector: Projector,
        provenance: Provenance,
        figures: JsonDict,
        state: dict[str, Any],
        best: bool,
        tuned: TunedWeights | None,
    ) -> None:
        folder = self.path / f"step-{step:08d}"
        metrics = {"step": step, **figures}
        save_checkpoint(folder, projector, provenance, self.training, metrics, state, tuned)
        if best:  # before `last`, whose state says that this loss has been reached
            point_to(self.path / "best", folder)
        point_to(self.path / "last", folder)
        kept = {(self.path / link).resolve() for link in ("last", "best")}
        old = [path for path in sorted(self.path.glob("step-*")) if path.resolve() not in kept]
        for path in old[: max(0, len(old) + 1 - self.config.keep)]:
            shutil.rmtree(path)
