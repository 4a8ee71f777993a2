"""What lies in a folder that was given as a model's."""

from __future__ import annotations

import json
from pathlib import Path

from llava_core.fingerprint import JsonDict


def config_of(folder: Path) -> JsonDict:
    """Its config.json; empty if there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def contents(folder: Path) -> str:
    """Its first files by name, for an error's `got`."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"
