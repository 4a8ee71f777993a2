"""A WebDataset tar of a source's image files that is being written (`extract run --keep-images`).

x.tar.part        image files as they come, each once, and the outcome of each row after its file
x.tar.part.lock   the process that writes
x.tar.part.tmp    the tar, being put together in the order of the rows
x_stats.json      its source and counts
x.tar             finished: ROW.jpg (or .png, as it came), ROW.txt if its words are a caption, and ROW.json

The tar has every row, those without an image, too, so that a cache made from it has the rows of the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from extract.open_output import Cache, OpenOutput
from extract.sources.base import Source, described
from extract.word_files import words_value
from llava_core import __version__
from llava_core.cli.console import counted, human_bytes, say
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock, flush, fsync, replace_text, write_all
from llava_core.row_status import Status
from llava_core.shards.dialogue import stored_dialogue
from llava_core.shards.part_file import FinishedMeanwhile, part_of, require_space
from llava_core.shards.writer import RowRecord
from llava_core.types import JsonDict
from llava_core.vision.image_formats import ImageError, image_suffix

SOURCE = "source.json"
"""First member of a part: what it is made from."""
DIGITS = 6
"""Digits of the rows' names; of more rows, as many as it takes."""


def statistics_of(path: Path) -> Path:
    """x_stats.json, named as img2dataset names it."""
    return path.with_name(f"{path.stem}_stats.json")


def is_kept(path: Path, source: Source) -> bool:
    """Whether the tar of this source is finished. Raises LlavaError if it is of another source."""
    if not path.exists():
        return False
    try:
        made_from = json.loads(statistics_of(path).read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, LookupError, TypeError):
        made_from = {}
    if made_from != (identity := source.identity()):
        do = "choose another --keep-images, or delete that tar"
        got = described(made_from) if made_from else f"none in {statistics_of(path)}"
        raise LlavaError(f"{path} was made from another file", expected=described(identity), got=got, do=do)
    return not part_of(path).exists()


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """Where the part has an image file."""

    offset: int
    size: int
    suffix: str


class OpenTar(OpenOutput):
    """The part of a tar, and the outcomes that wait to be written to it."""

    def __init__(self, path: Path, source: Source) -> None:
        """Create, or continue, the tar at `path`.

        Raises LlavaError if another process holds it or it was begun from another source; FinishedMeanwhile
        if it is finished.
        """
        self.path, self.part = path, part_of(path)
        self._lock = Lock(self.part)
        self._files: dict[bytes, StoredFile] = {}
        """By sha256."""
        self._records: dict[int, JsonDict] = {}
        self._appending = threading.Lock()
        try:
            if is_kept(path, source):
                raise FinishedMeanwhile
            self._identity, self._columns = source.identity(), source.read()
            self._descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._end = self._read_part()
            except BaseException:
                os.close(self._descriptor)
                raise
        except BaseException:
            self._lock.release()
            raise
        columns, done = self._columns, np.isin(np.arange(source.rows), [*self._records])
        cache = Cache(str(path), "files")
        super().__init__(cache, columns.image_refs, columns.captions, done, columns.images, columns.outcomes)

    def earlier(self) -> Iterator[RowRecord]:
        for row, kept in self._records.items():
            if kept["status"] == Status.OK.label:
                yield RowRecord(row, Status.OK, sha256=bytes.fromhex(kept["sha256"]))

    def outcome(self, record: RowRecord) -> RowRecord:
        return record

    def take_file(self, record: RowRecord, body: bytes) -> None:
        """Append the file to the part, unless that has it. Raises OSError if the disk is full."""
        try:
            suffix = image_suffix(body)
        except ImageError as error:
            record.status, record.reason = error.status, str(error)
            return
        with self._appending:
            if record.sha256 not in self._files:
                offset = self._append_member(record.sha256.hex() + suffix, body)
                self._files[record.sha256] = StoredFile(offset, len(body), suffix)

    def close(self) -> None:
        os.close(self._descriptor)
        self._lock.release()

    def _append(self, records: Sequence[RowRecord]) -> None:
        for record in records:
            kept = {"status": record.status.label}
            if record.status is Status.OK:
                kept["sha256"] = record.sha256.hex()
            if record.reason:
                kept["reason"] = record.reason
            with self._appending:
                self._append_member(f"{record.row}.json", json.dumps(kept).encode())
            self._records[record.row] = kept
        flush(self._descriptor, self.part)

    def _append_member(self, name: str, content: bytes) -> int:
        """Append a member; returns the offset of its content."""
        header = _member(name, len(content)).tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(content) % tarfile.BLOCKSIZE)
        write_all(self._descriptor, header + content + padding, self._end)
        offset = self._end + len(header)
        self._end = offset + len(content) + len(padding)
        return offset

    def _read_part(self) -> int:
        """Read what an interrupted run has left; returns where its last whole member ends.

        Raises LlavaError if it was begun from another source.
        """
        self._end = 0
        with open(self._descriptor, "rb", closefd=False) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        content = os.pread(self._descriptor, member.size, member.offset_data)
                        if len(content) < member.size or not self._take_member(member, content):
                            break
                        blocks = -(-member.size // tarfile.BLOCKSIZE)
                        self._end = member.offset_data + blocks * tarfile.BLOCKSIZE
            except tarfile.TarError:  # nothing yet, or a header that was cut
                pass
        os.ftruncate(self._descriptor, self._end)
        if not self._end:
            self._append_member(SOURCE, json.dumps(self._identity).encode())
        return self._end

    def _take_member(self, member: tarfile.TarInfo, content: bytes) -> bool:
        """Note what a member of the part holds; whether it is whole."""
        stem, suffix = os.path.splitext(member.name)
        if suffix != ".json":
            digest = hashlib.sha256(content).digest()
            self._files[digest] = StoredFile(member.offset_data, member.size, suffix)
            return digest.hex() == stem
        try:
            value = json.loads(content)
        except ValueError:
            return False
        if member.name != SOURCE:
            self._records[int(stem)] = value
        elif value != self._identity:
            do = f"choose another --keep-images, or delete {self.part.name}"
            expected, got = described(self._identity), described(value)
            raise LlavaError(f"{self.part} was begun from another file", expected=expected, got=got, do=do)
        return True

    def _finish(self) -> None:
        """Put the tar together in the order of the rows, and remove the part."""
        partial = self.part.with_name(self.part.name + ".tmp")
        images = 0
        require_space(self.path, self._end)  # while the part is there, too
        try:
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
                for row in range(len(self.urls)):
                    for suffix, content in self._sample(row):
                        name = f"{row:0{DIGITS}}{suffix}"
                        archive.addfile(_member(name, len(content)), io.BytesIO(content))
                        images += suffix not in (".txt", ".json")
            fsync(partial)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        figures = {"tool_version": __version__, "source": self._identity, "images": images}
        replace_text(statistics_of(self.path), json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
        fsync(statistics_of(self.path))  # the tar is refused without it
        partial.replace(self.path)
        self.part.unlink()
        fsync(self.path.parent)
        size = human_bytes(self.path.stat().st_size)
        say(f"{self.path}: {counted(images, 'image')} of {counted(len(self.urls), 'row')}, {size}")

    def _sample(self, row: int) -> Iterator[tuple[str, bytes]]:
        """Suffix and content of each file of a row."""
        kept, columns = self._records[row], self._columns
        if digest := kept.get("sha256"):
            file = self._files[bytes.fromhex(digest)]
            yield file.suffix, os.pread(self._descriptor, file.size, file.offset)
        about = {"id": columns.ids[row], "url": columns.image_refs[row], **kept}
        words = stored_dialogue(columns.captions[row] or "", columns.conversations)
        if words.turns:
            value = words_value(words)
            if isinstance(value, str):
                yield ".txt", value.encode("utf-8", "replace")
            about["messages" if isinstance(value[0], dict) else "caption"] = value
        yield ".json", json.dumps(about, ensure_ascii=False).encode("utf-8", "replace")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member
