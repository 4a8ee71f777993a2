"""Flags that say how `--data` is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from llava_core.cli.options import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """How --data is read."""

    groups: ClassVar[Mapping[str, str]] = {"Often changed": "images"}

    images: Path | None = None
    """Folder of the images that --data names by path; without it, the folder each file lies in."""
    image_column: str | None = None
    """Column of the images: addresses, paths, or the files themselves; without it, by its name. none: text
    alone, dialogues that train the language model (train --tune lora, llm)."""
    text_column: str | None = None
    """Column of the words: captions, lists of them, or dialogues; without it, by its name."""
    id_column: str | None = None
    """Column of the rows' names; without it, id or key, or else their numbers."""
    caption_key: str | None = None
    """Key of the caption where the words are objects, as in SA1B-Dense-Caption's cap_seg: global_caption."""
