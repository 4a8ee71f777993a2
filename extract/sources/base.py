"""What can be extracted: a source of rows, each an image with words. One source becomes one shard."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llava_core.filesystem import sha256_files
from llava_core.network.fetch import Fetched
from llava_core.types import JsonDict


class Images(Protocol):
    """Images that need no network. Threads call it."""

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        """The image of `row`, or why there is none; None for an address, which is to be downloaded."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The columns of a source."""

    places: list[str]
    """Where each image is, as the source says: an address, a path, or what it was called before it was put
    into a parquet file. Shards keep it as the url."""
    texts: list[str | None]
    """A caption, or a dialogue (`shards/dialogue.py`); None where there is none, or none that can be read."""
    ids: list[str]
    images: Images | None = None
    """None: every image is at an address."""
    conversations: bool = False
    """The texts are dialogues."""

    def after(self, rows: int) -> Rows:
        """The same without the first so many."""
        return Rows(
            places=self.places[rows:],
            texts=self.texts[rows:],
            ids=self.ids[rows:],
            images=self.images and _Later(self.images, rows),
            conversations=self.conversations,
        )


@dataclasses.dataclass(frozen=True)
class _Later:
    """Images without the first so many."""

    images: Images
    before: int

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        return self.images.load(row + self.before, max_bytes)


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """A file or folder of rows, or the first rows of it."""

    path: Path
    rows: int
    images: Path
    """Folder in which the images are that it names by path."""

    @property
    def stem(self) -> str:
        """Name of the shard."""
        return self.path.stem

    def identity(self) -> JsonDict:
        """name, rows and sha256: what a shard remembers of what it was made from."""
        return {"name": self.path.name, "rows": self.rows, "sha256": sha256_files([self.path])}

    def anywhere(self) -> Source:
        """The same by absolute paths, for a process in another folder."""
        return dataclasses.replace(self, path=self.path.absolute(), images=self.images.absolute())

    def first(self, rows: int) -> Source:
        """The same, cut to so many rows."""
        return dataclasses.replace(self, rows=rows)

    @abc.abstractmethod
    def read(self) -> Rows:
        """Raises LlavaError if the source is damaged."""


def captions_of(values: Sequence[object]) -> list[str | None]:
    """Captions without the space around them; None for anything but text."""
    return [value.strip() or None if isinstance(value, str) else None for value in values]


def is_address(place: str) -> bool:
    """Whether an image is to be downloaded; anything without a scheme is a path."""
    return "://" in place
