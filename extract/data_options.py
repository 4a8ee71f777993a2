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
    """Column of the images: addresses, paths, or the files themselves; by default found by its name. none:
    no images, dialogues that train the language model (train --tune lora, llm)."""
    text_column: str | None = None
    """Column of the text: captions, lists of them, or dialogues; by default found by its name."""
    id_column: str | None = None
    """Column of the rows' ids; by default id or key, otherwise row numbers."""
    caption_key: str | None = None
    """Key of the caption where the text is an object, as in SA1B-Dense-Caption's cap_seg: global_caption."""
