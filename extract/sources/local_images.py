"""Image files that a source names by path."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from extract.sources.base import is_address
from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.network.fetch import Fetched
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from llava_core.tables.shown import shown


class LocalImages:
    """Images at paths in one folder; those at addresses are to be downloaded."""

    def __init__(self, folder: Path, image_refs: Sequence[str]) -> None:
        self.folder, self.image_refs = folder, image_refs

    def load(self, row: int, max_bytes: int) -> Fetched | None:
        ref = self.image_refs[row]
        return None if is_address(ref) else read_image(self.folder, ref, max_bytes)


def local_images(path: Path, folder: Path, image_refs: Sequence[str]) -> LocalImages | None:
    """The images that the source at `path` names; None if all are at addresses.

    Raises LlavaError if it names only files and none of them exists: then the folder is wrong.
    """
    if all(map(is_address, image_refs)):
        return None
    named = [ref for ref in image_refs if ref]
    there = (is_address(ref) or os.path.exists(_inside(folder, ref) or "") for ref in named)
    if named and not any(there):
        raise LlavaError(
            f"none of the images that {path} names is in {folder}",
            got=shown(named[0]),
            do="name their folder with --images",
        )
    return LocalImages(folder, image_refs)


def read_image(folder: Path, name: str, max_bytes: int) -> Fetched:
    """The image file at `name`, a path in `folder`.

    The path may not lead out of the folder, by `..` or as an absolute path: the source is untrusted. Links in
    the folder are followed: its owner made them.
    """
    path = _inside(folder, name)
    if path is None:
        return _failed(Status.OUTSIDE_FOLDER, "its path leads out of the folder of the images")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
    except (FileNotFoundError, NotADirectoryError):
        return _failed(Status.NO_FILE, "nothing at its path")
    except ValueError:
        return _failed(Status.NO_FILE, "a zero byte in its path")
    except OSError as error:
        return _failed(Status.UNREADABLE_FILE, error.strerror or "")
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return _failed(Status.NO_FILE, "not a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            image = loaded(file.read(min(found.st_size, max_bytes) + 1), max_bytes)
            return dataclasses.replace(image, mtime=found.st_mtime_ns)
    except OSError as error:
        return _failed(Status.UNREADABLE_FILE, error.strerror or "")
    finally:
        os.close(descriptor)


def changed(folder: Path, shard: Shard | ShardWriter, image_refs: Sequence[str] = ()) -> np.ndarray:
    """Mask of the rows whose image file has changed since it was encoded, bool [N].

    `image_refs`: paths of the images; needed for an unfinished shard. Only a file of another size or mtime is
    read. A file that is gone has not changed: its features stay.
    """
    mtime, nbytes, sha256 = shard.mtime, shard.nbytes, shard.sha256
    rows = np.zeros(len(mtime), bool)
    if isinstance(shard, Shard) and mtime.any():
        image_refs = shard.urls()
    for row in np.flatnonzero(mtime).tolist():
        path = _inside(folder, image_refs[row])
        try:
            found = os.stat(path or "")
            same = found.st_mtime_ns == mtime[row] and nbytes[row] in (found.st_size, 0)
            if path and stat.S_ISREG(found.st_mode) and not same:
                rows[row] = sha256_files([Path(path)]) != sha256[row].tobytes().hex()
        except (OSError, ValueError):
            continue
    return rows


def _inside(folder: Path, name: str) -> str | None:
    """The absolute path of `name` in `folder`; None if it leads out of it. Links are not resolved."""
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    return path if os.path.commonpath([root, path]) == root else None


def loaded(body: bytes, max_bytes: int) -> Fetched:
    """An image in memory; the status says if it is too large."""
    if len(body) > max_bytes:
        return _failed(Status.TOO_LARGE, f"over {max_bytes:,} bytes")
    return Fetched(Status.OK, body, attempts=0)


def _failed(status: Status, detail: str) -> Fetched:
    return Fetched(status, attempts=0, detail=detail)
