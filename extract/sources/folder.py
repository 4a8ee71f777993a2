"""A folder of images with their captions beside them: `cat.jpg` and `cat.txt`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from extract.sources.base import Columns, Source, captions_of
from extract.sources.local_images import LocalImages
from llava_core.cli.console import say
from llava_core.types import JsonDict
from llava_core.vision.image_files import SUFFIXES


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Every image in the folder and those below it, in the order of their paths; hidden ones are left out."""

    @classmethod
    def find(cls, path: Path) -> Folder:
        return cls(path, sum(1 for _ in _walk(path)), path)

    @property
    def stem(self) -> str:
        return self.path.resolve().name or "images"

    def identity(self) -> JsonDict:
        """name, rows, and the sha256 of paths and captions; the shard records that of each image."""
        content = json.dumps([self._paths, self._captions]).encode()
        return {"name": self.stem, "rows": self.rows, "sha256": hashlib.sha256(content).hexdigest()}

    def read(self) -> Columns:
        return Columns(
            image_refs=self._paths,
            captions=captions_of(self._captions),
            ids=[os.path.splitext(path)[0] for path in self._paths],
            images=LocalImages(self.path, self._paths),
        )

    @functools.cached_property
    def _listing(self) -> list[tuple[str, Path | None]]:
        return sorted(_walk(self.path), key=lambda found: found[0])[: self.rows]

    @property
    def _paths(self) -> list[str]:
        return [path for path, _ in self._listing]

    @functools.cached_property
    def _captions(self) -> list[str | None]:
        captions, unread = [], []
        for _, path in self._listing:
            try:
                captions.append(path.read_text(encoding="utf-8-sig") if path else None)
            except (OSError, UnicodeDecodeError):
                captions.append(None)
                unread.append(str(path))
        if unread:
            say(f"{len(unread):,} captions in {self.path} are no UTF-8 text, such as {unread[0]}")
        return captions


def _walk(folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Each image as a path relative to `folder`, and the file of its caption."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        captions = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES and not name.startswith("."):
                caption = Path(parent, captions[stem]) if stem in captions else None
                yield os.path.relpath(os.path.join(parent, name), folder), caption
