"""A folder of images with their words beside them: `1.txt` beside `1.jpg`, or `labels_zh/1.json`."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from extract.sources.base import BY_NAME, Columns, DataFlags, Source
from extract.sources.local_images import LocalImages
from llava_core.cli.console import say, say_once
from llava_core.tables.words import SAMPLE, WordReader
from llava_core.types import JsonDict
from llava_core.vision.image_files import SUFFIXES
from llava_core.vision.image_formats import ImageError, image_format

TEXT_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of the words of an image, the preferred first: `a.txt` or `a.jpg.txt`."""
LABELS = ("labels_zh", "labels", "labels_en")
"""Folders of the words of the images in a folder `images` beside them, the preferred first."""
TABLES = (".parquet", ".arrow", ".jsonl", ".csv", ".tsv", ".gz", ".tar", ".json", ".md", ".h5")
"""Suffixes of files that are not counted as left out."""


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Every image in the folder and those below it, in the order of their paths; hidden ones are left out."""

    @classmethod
    def find(cls, path: Path, flags: DataFlags = BY_NAME) -> Folder:
        """Prints how many files of which kind are no images."""
        left_out: collections.Counter[str] = collections.Counter()
        found = cls(path, sum(1 for _ in _walk(path, left_out)), path, flags)
        mention_left_out(path, left_out)
        if found.rows:
            dataclasses.replace(found, rows=min(found.rows, SAMPLE))._reader()
        return found

    @property
    def name(self) -> str:
        return self.path.resolve().name or "images"

    def identity(self) -> JsonDict:
        """name, rows, and the sha256 of paths and captions; the shard records that of each image."""
        content = json.dumps([self._paths, self._captions]).encode()
        return {"name": self.name, "rows": self.rows, "sha256": hashlib.sha256(content).hexdigest()}

    def read(self) -> Columns:
        reader = self._reader()
        words, outcomes = reader.read(self._values)
        captions, conversations = reader.texts_of(words)
        return Columns(
            image_refs=self._paths,
            captions=captions,
            ids=[os.path.splitext(path)[0] for path in self._paths],
            images=LocalImages(self.path, self._paths),
            conversations=conversations,
            outcomes=outcomes,
        )

    def _reader(self) -> WordReader:
        return WordReader(str(self.path), "text", self._values[:SAMPLE], self.flags.caption_key)

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
            say_once(f"{len(unread):,} captions in {self.path} are not UTF-8 text, such as {unread[0]}")
        return captions

    @functools.cached_property
    def _values(self) -> list[object]:
        """The words of each image as they are in their files, JSON decoded."""
        values: list[object] = []
        for text, (_, path) in zip(self._captions, self._listing, strict=True):
            value: object = text
            if text is not None and path is not None and path.suffix.lower() == ".json":
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError):
                    value = None
            values.append(value)
        return values


def mention_left_out(path: Path, left_out: Mapping[str, int]) -> None:
    """Print how many files of which suffix are no images and no words."""
    left_out = {kind: n for kind, n in left_out.items() if n}
    if left_out:
        kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{n:,} {suffix or 'without suffix'}" for suffix, n in kinds[:6])
        more = f" and {len(kinds) - 6} other kinds" if len(kinds) > 6 else ""
        say(f"{path}: {named}{more} left out; images are {' '.join(SUFFIXES)}")


def _walk(
    folder: Path, left_out: collections.Counter[str] | None = None
) -> Iterator[tuple[str, Path | None]]:
    """Each image as a path relative to `folder`, and the file of its words; counts the other files."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if left_out is not None:
            left_out["folders by a link"] += sum(
                os.path.islink(os.path.join(parent, name)) for name in folders
            )
            if os.path.basename(parent) == "images":
                labels = [name for name in LABELS if os.path.isdir(os.path.join(parent, "..", name))]
                left_out.update(f"folder {name}" for name in labels[1:])
        names = [name for name in names if not name.startswith(".")]
        images = [name for name in names if _is_image(parent, name)]
        texts = _texts(Path(parent), names, Path(folder))
        below = os.path.relpath(parent, folder)
        for name in images:
            stem = os.path.splitext(name)[0]
            path = texts.get(stem) or texts.get(name)
            yield name if below == os.curdir else os.path.join(below, name), path
        if left_out is not None:
            stems = {key for name in images for key in (name, os.path.splitext(name)[0])}
            others = (os.path.splitext(name) for name in {*names} - {*images})
            left_out.update(
                suffix.lower()
                for stem, suffix in others
                if suffix.lower() not in TABLES and not (suffix.lower() in TEXT_SUFFIXES and stem in stems)
            )


def _is_image(parent: str, name: str) -> bool:
    """By its suffix; a file without one by its first bytes."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix:
        return suffix in SUFFIXES
    try:
        with open(os.path.join(parent, name), "rb") as file:
            image_format(file.read(32))
    except (OSError, ImageError):
        return False
    return True


def _texts(parent: Path, names: Iterable[str], top: Path) -> dict[str, Path]:
    """Files of words by the name of their image, with or without its suffix; the preferred ones not empty."""
    found: dict[str, Path] = {}
    labels = _label_folder(parent, top)
    for folder, files in [(parent, names), *([(labels, os.listdir(labels))] if labels else [])]:
        for suffix in TEXT_SUFFIXES:
            for name in files:
                stem = name[: -len(suffix)]
                if name.lower().endswith(suffix) and not (stem in found and _has_text(found[stem])):
                    found[stem] = folder / name
    return found


def _has_text(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _label_folder(parent: Path, top: Path) -> Path | None:
    """Folder of the words of images: `labels/a` for `images/a`; `images` is `top`, or a folder in it."""
    for images in (parent, *parent.parents):
        if images.name == "images":
            places = (images.with_name(label) / parent.relative_to(images) for label in LABELS)
            return next((place for place in places if place.is_dir()), None)
        if images == top:
            break
    return None


def images_of_labels(path: Path) -> Iterator[Path]:
    """Where the image of a file of words in a label folder would lie, but for its suffix."""
    for folder in path.parents:
        if folder.name in LABELS:
            yield folder.with_name("images") / path.relative_to(folder)
