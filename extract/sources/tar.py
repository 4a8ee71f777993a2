"""Tar archives of samples, as WebDataset and img2dataset write them: `000.jpg`, `000.txt`, `000.json`, …"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extract.sources.base import Columns, DataFlags, Source
from extract.sources.folder import TEXT_SUFFIXES, mention_left_out
from extract.sources.local_images import loaded
from llava_core.cli.console import say_once
from llava_core.errors import LlavaError, first_line
from llava_core.network.fetch import Fetched
from llava_core.row_status import Outcome, Status
from llava_core.tables.words import SAMPLE, WordReader
from llava_core.types import JsonDict
from llava_core.vision.image_files import SUFFIXES as IMAGE_SUFFIXES

STATUS_OF = {status.label: status for status in Status if status is not Status.PENDING}
"""Outcomes by what `extract run --keep-images` writes of them."""
NOTED = {"id", "url", "status", "sha256", "reason", "caption", "messages"}
"""Keys of what it writes of a row."""
END = 1 << 20
"""Bytes read at a time after the last member."""


class Member(NamedTuple):
    """A file in the archive."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Tar(Source):
    """Every sample with an image or words, in the order of the archive."""

    @classmethod
    def find(cls, path: Path, flags: DataFlags) -> Tar:
        """Raises LlavaError if the archive is damaged, or has no image, or no words that can be read; without
        either, one that `extract run --keep-images` wrote is read all the same."""
        samples, left_out = _samples(path)
        with path.open("rb") as file:
            kept = any(_note(file.fileno(), sample) for sample in itertools.islice(samples.values(), 1))
        if not kept and not any(_image(sample) for sample in samples.values()):
            kinds = ", ".join(left_out) or "nothing"
            raise LlavaError(f"no image in {path}", expected=" ".join(IMAGE_SUFFIXES), got=kinds)
        mention_left_out(path, left_out)
        found = cls(path, len(samples), path.parent, flags)
        found._columns(dict(itertools.islice(samples.items(), SAMPLE)))
        return found

    def read(self) -> Columns:
        return self._columns(dict(itertools.islice(_samples(self.path)[0].items(), self.rows)))

    def _columns(self, samples: dict[str, dict[str, Member]]) -> Columns:
        images = [_image(sample) for sample in samples.values()]
        values, missing, digests = list[object](), dict[int, Outcome](), dict[int, bytes]()
        with self.path.open("rb") as file:
            for row, sample in enumerate(samples.values()):
                note = _note(file.fileno(), sample)
                values.append(self._words(note, _words(file.fileno(), sample)))
                if isinstance(digest := note.get("sha256"), str):
                    digests[row] = digest.encode()
                if images[row] is None and note and (status := STATUS_OF[note["status"]]) is not Status.OK:
                    missing[row] = Outcome(status, str(note.get("reason", "")))
        reader = WordReader(str(self.path), "text", values[:SAMPLE], self.flags.caption_key)
        words, outcomes = reader.read(values)
        captions, conversations = reader.texts_of(words)
        return Columns(
            image_refs=[image.name if image else "" for image in images],
            captions=captions,
            ids=list(samples),
            images=_TarImages(self.path, images, missing, digests),
            conversations=conversations,
            outcomes=outcomes,
        )

    def _words(self, note: JsonDict, value: object) -> object:
        """The words of a sample: its value, or as they were noted, which are no JSON, however they look."""
        words = note.get("messages", note.get("caption"))
        if not note or (isinstance(value, str) and value != words):
            return value
        return None if words is None else {self.flags.caption_key or "caption": words}


class _TarImages:
    def __init__(
        self,
        path: Path,
        images: list[Member | None],
        missing: Mapping[int, Outcome],
        digests: Mapping[int, bytes],
    ) -> None:
        """`missing`: why some of them are not there; `digests`: sha256 of some of the files, in hex."""
        self.path, self.images, self.missing, self.digests = path, images, missing, digests

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        if (image := self.images[row]) is None:
            status, why = self.missing.get(row, Outcome(Status.NO_FILE, "no image in the sample"))
            return Fetched(status, attempts=0, detail=why)
        try:
            with self.path.open("rb") as file:
                body = _content(file.fileno(), image, max_bytes + 1)
        except OSError as error:
            return Fetched(Status.UNREADABLE_FILE, attempts=0, detail=first_line(error))
        noted = self.digests.get(row)
        if noted and len(body) == image.size and hashlib.sha256(body).hexdigest().encode() != noted:
            return Fetched(Status.UNREADABLE_FILE, attempts=0, detail="damaged: another sha256 than noted")
        return loaded(body, max_bytes)


def _samples(path: Path) -> tuple[dict[str, dict[str, Member]], dict[str, int]]:
    """The files of each sample by suffix, in lower case; and the number of other files by suffix.

    A sample's name ends at the last dot (`22.05.png`, `22.05.txt`), or, if no image has words then, at the
    first (`7.input.jpg`, `7.output.txt`).
    """
    files, left_out = [], collections.Counter[str]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, suffix = os.path.splitext(member.name)
                if member.isfile() and (suffix.lower() in IMAGE_SUFFIXES or suffix.lower() in TEXT_SUFFIXES):
                    place = Member(member.name, member.offset_data, member.size)
                    files.append((stem, suffix.lower(), place))
                elif member.isfile():
                    left_out[suffix.lower()] += 1
                elif not member.isdir():
                    left_out["links"] += 1
            _require_end(path, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        got = first_line(error)
        raise LlavaError(f"{path} is a damaged tar archive", got=got, do="download it again") from None
    by_last, by_first = _grouped(files), _grouped([(_first_stem(stem), *rest) for stem, *rest in files])
    if not any(map(_is_complete, by_last.values())):
        by_last = by_first
    for sample in by_last.values():
        left_out.update([suffix for suffix in IMAGE_SUFFIXES if suffix in sample][1:])
    for stem in [stem for stem, sample in by_last.items() if not _is_complete(sample)]:
        if _first_stem(stem) != stem and _is_complete(by_last.get(_first_stem(stem), {})):
            left_out.update(stem.rpartition(".")[2] + suffix for suffix in by_last.pop(stem))
    return by_last, left_out


def _grouped(files: Sequence[Any]) -> dict[str, dict[str, Member]]:
    samples: dict[str, dict[str, Member]] = {}
    for stem, suffix, member in files:
        samples.setdefault(stem, {})[suffix] = member  # the last one counts, as in tar itself
    return samples


def _require_end(path: Path, offset: int) -> None:
    """Raise tarfile.ReadError if more follows the last member; print a line if not even the end mark does."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(END)
        whole = bool(rest)
        while rest and not rest.strip(b"\0"):
            rest = file.read(END)
    if rest:
        raise tarfile.ReadError(f"more after the last member, at {offset:,}: damaged, or two in one file")
    if not whole:
        say_once(f"{path} has no end mark: samples may be missing from its end")


def _first_stem(stem: str) -> str:
    folder, base = os.path.split(stem)
    return os.path.join(folder, base.partition(".")[0])


def _is_complete(sample: dict[str, Member]) -> bool:
    return _image(sample) is not None and not sample.keys().isdisjoint(TEXT_SUFFIXES)


def _image(sample: dict[str, Member]) -> Member | None:
    return next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)


def _words(descriptor: int, sample: dict[str, Member]) -> object:
    """Text of the sample, or the value of its JSON."""
    for suffix in TEXT_SUFFIXES:
        if suffix in sample:
            text = _content(descriptor, sample[suffix]).decode("utf-8-sig", "replace")
            if not text:
                continue
            if suffix != ".json":
                return text
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                return None
    return None


def _note(descriptor: int, sample: dict[str, Member]) -> JsonDict:
    """What `extract run --keep-images` noted of the sample, by keys of NOTED; empty in other archives."""
    if ".json" not in sample:
        return {}
    try:
        about: JsonDict = json.loads(_content(descriptor, sample[".json"]))
        known = about["status"] in STATUS_OF and about.keys() <= NOTED
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return about if known else {}


def _content(descriptor: int, member: Member, most: int | None = None) -> bytes:
    size = member.size if most is None else min(member.size, most)
    return os.pread(descriptor, size, member.offset)
