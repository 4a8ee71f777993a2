"""Flags of a run as its folder keeps them: their defaults, and which may differ when it continues."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.config import RunConfig

FREE_KEYS = {
    *("json", "resume", "dry_run", "keep", "log_every", "report_to", "device", "save_every", "out"),
    *("micro_tokens", "resident", "eval_captions", "compile", "gradient_checkpointing"),
}
"""Flags that may differ when a run continues: they do not change the trained weights."""
MOVABLE_KEYS = {"features", "eval_features", "text", "eval_text", "rows", "llm", "init"}
"""Flags that name folders or files. When a run continues, their contents are compared, wherever they are."""


def plain(value: object) -> object:
    """A flag's value as YAML and JSON have it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


DEFAULTS = {field.name: plain(field.default) for field in dataclasses.fields(RunConfig)}
OLD_INSTRUCTIONS = "mixed"
BEFORE = {**DEFAULTS, "instructions": OLD_INSTRUCTIONS}
"""What a flag that is newer than a run, or a sweep, was in effect there."""
