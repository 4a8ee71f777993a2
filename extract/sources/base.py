"""A source: a file or folder of rows, each an image with its text. One source becomes one shard."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from llava_core.filesystem import sha256_files
from llava_core.network.request_url import clean_address
from llava_core.row_status import Outcome
from llava_core.types import JsonDict

if TYPE_CHECKING:  # with aiohttp, which `extract inspect` does without
    from llava_core.network.fetch import Fetched

PLAIN_HOST = re.compile(r"https?://[A-Za-z0-9.-]+(?::[0-9]+)?(?=[/?#]|$)", re.ASCII)
"""The beginning of most addresses, which says what their host is."""


class Images(Protocol):
    """Images that need no network. Several threads may call `load`."""

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        """Image of `row`, or why there is none; None if it is at an address, to be downloaded."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a source."""

    image_refs: list[str]
    """Where each image is, as the source has it: an address, a path, or the name it had before it was put
    into a parquet file. Shards keep it as the url."""
    captions: list[str | None]
    """A caption, or a dialogue (`shards/dialogue.py`); None where it is missing or unreadable."""
    ids: list[str]
    images: Images | None = None
    """Images that need no network; None if every image is at an address."""
    conversations: bool = False
    """Whether `captions` holds dialogues."""
    outcomes: Mapping[int, Outcome] = dataclasses.field(default_factory=dict)
    """Rows whose outcome is known already: text only, several images, or words with an unknown role."""

    def after(self, rows: int) -> Columns:
        """The columns without the first N rows."""
        return Columns(
            image_refs=self.image_refs[rows:],
            captions=self.captions[rows:],
            ids=self.ids[rows:],
            images=self.images and _ImagesAfter(self.images, rows),
            conversations=self.conversations,
            outcomes={row - rows: outcome for row, outcome in self.outcomes.items() if row >= rows},
        )


@dataclasses.dataclass(frozen=True)
class _ImagesAfter:
    """Images without those of the first `before` rows."""

    images: Images
    before: int

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        return self.images.load(row + self.before, max_bytes)


@dataclasses.dataclass(frozen=True)
class DataFlags:
    """How `--data` is read: the flags of the same names."""

    images: Path | None = None
    """Folder of the images that the sources name by path; None: the folder each source lies in."""
    image_column: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    caption_key: str | None = None

    @classmethod
    def of(cls, config: object) -> DataFlags:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


BY_NAME = DataFlags()
"""Without any flag."""


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """A file or folder of rows, or its first `rows` rows."""

    path: Path
    rows: int
    images: Path
    """Folder of the images that it names by path."""
    flags: DataFlags = BY_NAME
    prefix: str = ""
    """Beginning of the shard's name, where two sources have the same name."""

    @property
    def name(self) -> str:
        """File name without suffixes."""
        return self.path.name.removesuffix(".gz").rpartition(".")[0] or self.path.name

    @property
    def stem(self) -> str:
        """File name of the shard, without suffix."""
        return self.prefix + self.name

    def identity(self) -> JsonDict:
        """name, rows and sha256, which the shard records."""
        return {"name": self.path.name, "rows": self.rows, "sha256": sha256_files([self.path])}

    def absolute(self) -> Source:
        """This source by absolute paths, for a process in another folder."""
        return dataclasses.replace(self, path=self.path.absolute(), images=self.images.absolute())

    def first(self, rows: int) -> Source:
        """The first `rows` rows of this source."""
        return dataclasses.replace(self, rows=rows)

    @abc.abstractmethod
    def read(self) -> Columns:
        """Read the columns. Raises LlavaError if the source is damaged."""


def described(identity: JsonDict) -> str:
    """A source's identity in words."""
    rows, digest = identity.get("rows"), str(identity.get("sha256"))
    return f"{identity.get('name')} of {rows:,} rows, sha256 {digest[:12]}…"


def is_address(image_ref: str) -> bool:
    """Whether an image is to be downloaded; anything without a scheme, but for `//host.name/`, is a path."""
    return "://" in image_ref or "://" in clean_address(image_ref)


def hosts_of(urls: Sequence[str]) -> list[str]:
    """`host_of` each; addresses that begin alike are looked at once."""
    known: dict[str, str] = {}
    hosts = []
    for url in urls:
        plain = PLAIN_HOST.match(url)
        key = plain[0] if plain else url
        if (host := known.get(key)) is None:
            host = host_of(key)
            if plain:
                known[key] = host
        hosts.append(host)
    return hosts


def host_of(url: str) -> str:
    """Host of an address alone: user names, passwords and queries stay out of every report."""
    try:
        return urlsplit(clean_address(url)).hostname or "(no host)"
    except ValueError:
        return "(no host)"
