"""The caches that a sweep compares: values of --space features, which name folders of --features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_core.errors import LlavaError
from llava_core.input_folders import folders_of, names_of
from train.config import RunConfig


def named_caches(value: str, base: RunConfig) -> list[Path]:
    """The folders of --features that a value names, by name or path: one, or several to be fused, as A+B.

    Raises LlavaError (wrong usage) for a name that is not among them.
    """
    folders = folders_of(base.features)
    known = dict(zip(names_of(folders), folders, strict=True))
    known |= {os.path.abspath(folder): folder for folder in folders}
    found = [known.get(word) or known.get(os.path.abspath(word)) for word in value.split("+")]
    if None in found:
        expected = f"folders of --features, or A+B of them: {', '.join(names_of(folders))}"
        raise LlavaError("--space features", expected=expected, got=value or "nothing", exit_code=2)
    return [folder for folder in found if folder]


def require_caches(values: Sequence[object], fuses: bool, base: RunConfig) -> None:
    """Raise LlavaError (wrong usage) unless --fuse, or the space if it `fuses`, joins caches of one trial."""
    if base.mix is not None:
        raise LlavaError("--space features beside --mix", expected="one of them", exit_code=2)
    several = [value for value in map(str, values) if len(named_caches(value, base)) > 1]
    if several and base.fuse is None and not fuses:
        expected = "--fuse channels, tokens or layers, for caches read together"
        raise LlavaError("--space features", expected=expected, got=several[0], exit_code=2)


def caches_of(value: str, base: RunConfig, fuse: object) -> dict[str, Any]:
    """The flags of a trial that say what it reads; of --eval-features it has those of its own encoders."""
    from train.data.sources import held_out_of  # with numpy, which flag checks do without

    folders = named_caches(value, base)
    held_out = held_out_of(folders, folders_of(base.eval_features))
    return {
        "features": tuple(folders),
        "eval_features": tuple(held_out),
        "fuse": fuse if len(folders) > 1 else None,
    }
