"""What makes two feature caches the same: one hash over encoder and preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JsonDict = dict[str, Any]

ENCODER_KEYS = ("weights_sha256", "layer", "tokens", "width")
PREPROCESS_KEYS = ("size", "filter", "crop", "decode", "exif", "mean", "std")
"""What decides the values of features. A folder's name, the number type and Pillow's version are recorded
beside these but not hashed: a laptop in fp32 must be able to use what a GPU in bf16 has cached."""


def fingerprint(encoder: JsonDict, preprocess: JsonDict) -> str:
    """sha256, in hex, over the canonical JSON of the keys above; a missing key counts as null."""
    content = {
        "encoder": {key: encoder.get(key) for key in ENCODER_KEYS},
        "preprocess": {key: preprocess.get(key) for key in PREPROCESS_KEYS},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(ours: JsonDict, theirs: JsonDict) -> list[str]:
    """Each fingerprinted key whose values differ, as 'size: 224 vs 336'."""
    return [
        f"{key}: {_short(ours.get(key))} vs {_short(theirs.get(key))}"
        for key in ENCODER_KEYS + PREPROCESS_KEYS
        if ours.get(key) != theirs.get(key)
    ]


def first_difference(ours: JsonDict, theirs: JsonDict) -> str | None:
    """The first of `differences`."""
    return next(iter(differences(ours, theirs)), None)


def sha256_files(paths: Sequence[Path]) -> str:
    """sha256, in hex, over the contents of the files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"
