"""Folders that were given: what lies in a model's, whether one can be written to, and on which disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.fingerprint import JsonDict


def config_of(folder: Path) -> JsonDict:
    """Its config.json; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def require_plain_weights(folder: Path) -> None:
    """Raise LlavaError if the config.json of a model says that its weights are quantised."""
    if quantised := config_of(folder).get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LlavaError(
            f"the weights in {folder} are quantised",
            expected="weights in bf16, fp16 or fp32 (a language model's may be a GGUF file)",
            got=method or "quantization_config in config.json",
            do="use the folder that the model was published in before it was quantised",
        )


def contents(folder: Path) -> str:
    """Its first files by name, for an error's `got`."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"


def nearest_existing(path: Path) -> Path:
    """The path if something is there, else the folder above it that is: its disk is the path's."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def require_folder(out: Path) -> None:
    """Raise LlavaError (wrong usage) if --out, there or not, cannot be a folder that is written to."""
    there = nearest_existing(out)
    if not there.is_dir():
        raise LlavaError("--out", expected="a folder", got=f"the file {there}", exit_code=2)
    if not os.access(there, os.W_OK):
        raise LlavaError("--out", expected="a folder that can be written to", got=there, exit_code=2)
