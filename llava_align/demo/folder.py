"""The demo's folder: emptied for a new one, or that of a finished one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.types import JsonDict

MARK = ".llava-demo"
"""File that marks a demo's folder; it holds the flags that the pictures depend on."""


def clear(out: Path) -> None:
    """Empty or make the folder. Raises LlavaError if it has files that no demo made."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise LlavaError(f"{out} holds something else", do="choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


def finished_demo(out: Path) -> JsonDict:
    """Flags of the demo in a folder. Raises LlavaError unless one is there, and finished."""
    try:
        made: JsonDict = json.loads((out / MARK).read_text())
    except (OSError, ValueError):
        made = {}
    if not {"rows", "held_out", "seed"} <= made.keys() or not (out / "answers.png").exists():
        do = f"run it first: python -m llava_align demo --out {out}"
        raise LlavaError(f"{out} holds no finished demo of this version", do=do)
    return made
