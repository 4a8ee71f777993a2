"""sha256 of files, and the type of what is read from JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JsonDict = dict[str, Any]


def sha256_files(paths: Sequence[Path]) -> str:
    """sha256, in hex, over the contents of the files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
