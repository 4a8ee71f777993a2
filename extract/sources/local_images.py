"""Images in files that a source names by path."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from extract.sources.base import is_address
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import sha256_files
from llava_core.network.fetch import Fetched
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter


class Files:
    """Images at paths of one folder; those at addresses are left to the downloads."""

    def __init__(self, folder: Path, places: Sequence[str]) -> None:
        self.folder, self.places = folder, places

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        place = self.places[row]
        return None if is_address(place) else read_image(self.folder, place, max_bytes)


def local_files(path: Path, folder: Path, places: Sequence[str]) -> Files | None:
    """The images that `path` names; None if all are at addresses.

    Raises LlavaError if it names files alone and not one of them is there: that is a wrong folder.
    """
    if all(map(is_address, places)):
        return None
    named = [place for place in places if place]
    there = (is_address(place) or os.path.exists(_inside(folder, place) or "") for place in named)
    if named and not any(there):
        raise LlavaError(
            f"none of the images that {path} names is in {folder}",
            got=named[0],
            do="name their folder with --images",
        )
    return Files(folder, places)


def read_image(folder: Path, place: str, max_bytes: int) -> Fetched:
    """The file at `place`, a path in `folder`.

    The path may not lead out of the folder, by `..` or as an absolute one: the source may come from a
    stranger. Links in the folder are followed wherever they lead: whoever set up the folder made them.
    """
    path = _inside(folder, place)
    if path is None:
        return _failed(Status.OUTSIDE_FOLDER, f"not in {folder}")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last one for a zero byte
        return _failed(Status.NO_FILE, first_line(error))
    except OSError as error:
        return _failed(Status.UNREADABLE_FILE, first_line(error))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return _failed(Status.NO_FILE, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            image = loaded(file.read(min(found.st_size, max_bytes) + 1), max_bytes)
            return dataclasses.replace(image, mtime=found.st_mtime_ns)
    except OSError as error:
        return _failed(Status.UNREADABLE_FILE, first_line(error))
    finally:
        os.close(descriptor)


def changed(folder: Path, shard: Shard | ShardWriter, places: Sequence[str] = ()) -> np.ndarray:
    """Rows whose image file holds something else than when it was read, bool [N]; `places` if it is begun.

    Only a file of another size or mtime is read. One that is gone has not changed: its features stay.
    """
    mtime, nbytes, sha256 = shard.mtime, shard.nbytes, shard.sha256
    rows = np.zeros(len(mtime), bool)
    if isinstance(shard, Shard) and mtime.any():
        places = shard.urls()
    for row in np.flatnonzero(mtime).tolist():
        path = _inside(folder, places[row])
        try:
            found = os.stat(path or "")
            same = found.st_mtime_ns == mtime[row] and nbytes[row] in (found.st_size, 0)
            if path and stat.S_ISREG(found.st_mode) and not same:
                rows[row] = sha256_files([Path(path)]) != sha256[row].tobytes().hex()
        except (OSError, ValueError):
            continue
    return rows


def _inside(folder: Path, place: str) -> str | None:
    """The absolute path, or None if it leads out of the folder; links are not looked at."""
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, place))
    return path if os.path.commonpath([root, path]) == root else None


def loaded(body: bytes, max_bytes: int) -> Fetched:
    """An image that is there, unless it is too large."""
    if len(body) > max_bytes:
        return _failed(Status.TOO_LARGE, f"over {max_bytes:,} bytes")
    return Fetched(Status.OK, body, attempts=0)


def _failed(status: Status, detail: str) -> Fetched:
    return Fetched(status, attempts=0, detail=detail)
