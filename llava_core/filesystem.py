"""Files: atomic replacement, fsync, locks, sha256; and checks of paths given to commands."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from llava_core.cli.console import say
from llava_core.errors import LlavaError
from llava_core.types import JsonDict

if TYPE_CHECKING:  # which --help does without
    import numpy as np

LACKING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Numbers of an OSError that mean the file system (some network and FUSE ones) has no locks or fsync."""
PAGE_BEGINS = b"<!doctype html"
"""First bytes of a page of this project."""


def read_json_lines(path: Path) -> list[JsonDict]:
    """Objects of a JSON Lines file, without a last line that is still being written."""
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at U+2028, too
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write or replace a file atomically: yields a temporary name, which then becomes `path`.

    After an error nothing is left of it, and an OSError names the file.
    """
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            if error.filename in (None, str(partial)):  # a full disk leaves it out
                error.filename = str(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write or replace a text file atomically, as UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_all(descriptor: int, data: bytes | bytearray | np.ndarray, offset: int) -> None:
    """Write all bytes at `offset`, then read them back. Raises OSError if the disk is full or they differ."""
    view = memoryview(data) if isinstance(data, (bytes, bytearray)) else data.reshape(-1).view("u1").data
    start, rest = offset, view
    while rest:
        written = os.pwrite(descriptor, rest, start)
        if not written:
            raise OSError(errno.EIO, "a write to this disk does nothing")
        rest, start = rest[written:], start + written
    if os.pread(descriptor, len(view), offset) != bytes(view):  # a memoryview compares byte by byte
        raise OSError(errno.EIO, "bytes read back are not those written: this disk or file system is faulty")


def sha256_files(paths: Sequence[Path]) -> str:
    """sha256, in hex, over the contents of the files one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor, path, whole=True)
    finally:
        os.close(descriptor)


def flush(descriptor: int, path: Path, whole: bool = False) -> None:
    """Wait until the bytes written to the open file at `path` are on disk, if the file system supports it.

    With `whole`, or on a system without fdatasync, also the file's times. On macOS fsync only hands the bytes
    to the disk; F_FULLFSYNC waits until they are on it.
    """
    with tolerated(path, without_flush):
        if full := getattr(fcntl, "F_FULLFSYNC", None):
            try:
                fcntl.fcntl(descriptor, full)
                return
            except OSError as error:
                if error.errno not in (*LACKING, errno.ENOTTY):  # a network file system has fsync alone
                    raise
        if whole or not hasattr(os, "fdatasync"):
            os.fsync(descriptor)
        else:
            os.fdatasync(descriptor)


def read_into(descriptor: int, out: memoryview, offset: int) -> int:
    """Read bytes at `offset` into `out` until it is full or the file ends; returns their number."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    data = os.pread(descriptor, len(out), offset)  # macOS before 11
    out[: len(data)] = data
    return len(data)


def without_flush(folder: Path, reason: str) -> str:
    """Warning about a file system without fsync."""
    return (
        f"{folder}: its file system does not wait for the disk ({reason}); "
        "a loss of power may cost what was written last"
    )


@contextlib.contextmanager
def tolerated(path: Path, warning: Callable[[Path, str], str]) -> Iterator[None]:
    """Print a warning, once for each file system, if it lacks the operation; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in LACKING:
            raise
        folder = path if path.is_dir() else path.absolute().parent
        if (key := (os.stat(folder).st_dev, warning)) not in _warned:
            _warned.add(key)
            say(warning(folder, error.strerror or str(error)))


_warned: set[tuple[int, Callable[[Path, str], str]]] = set()


def flock(descriptor: int, path: Path, operation: int) -> None:
    """`fcntl.flock`, if the file system has locks. Raises BlockingIOError if another process holds it."""
    with tolerated(path, without_locks):
        fcntl.flock(descriptor, operation)


def without_locks(folder: Path, reason: str) -> str:
    """Warning about a file system without locks."""
    return f"{folder}: its file system has no locks ({reason}); let only one process at a time write there"


class Held(LlavaError):
    """Another process holds the lock."""


class Lock:
    """Exclusive lock for writing `what`: a flock on the file `what`.lock, which names its holder.

    The kernel releases it when its holder dies. Raises Held, naming the holder, if it is taken.
    """

    def __init__(self, what: Path) -> None:
        what = what.absolute()  # "." has no name
        self.path = path = what.with_name(what.name + ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                flock(self.descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip()
                os.close(self.descriptor)
                raise Held(f"{what} is being written", got=holder, do="wait for it, or stop it") from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(self.descriptor).st_ino == path.stat().st_ino:
                    break
            os.close(self.descriptor)  # its holder removed the file between our open and our lock
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"by process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def nearest_existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists: the disk on which the path would be."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def require_folder(out: Path, flag: str = "--out") -> None:
    """Raise LlavaError (wrong usage) unless the flag's value is, or could be made, a writable folder."""
    for place in (out, *out.absolute().parents):
        if place.is_symlink() and not place.exists():
            got = f"{place}, a link to nothing"
            raise LlavaError(flag, expected="a folder", got=got, exit_code=2)
    there = nearest_existing(out)
    if not there.is_dir():
        raise LlavaError(flag, expected="a folder", got=f"the file {there}", exit_code=2)
    if not os.access(there, os.W_OK):
        raise LlavaError(flag, expected="a folder that can be written to", got=there, exit_code=2)


def matching(pattern: str) -> list[Path]:
    """The file or folder at a path, or the matches of a glob, by name."""
    path = Path(pattern)
    return [path] if path.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))


def require_matches(flag: str, pattern: str | None) -> None:
    """Raise LlavaError unless there is a file at the path, or a match of the glob; None is right."""
    if pattern is not None and not any(path.is_file() for path in matching(pattern)):
        raise LlavaError(f"no file {pattern}", do=f"give {flag} one that is there, or a pattern of some")


def require_file(flag: str, path: Path) -> None:
    """Raise LlavaError unless the path is a file (or a pipe) that exists."""
    if not path.exists():
        raise LlavaError(f"no file {path}", do=f"give {flag} one that is there")
    if path.is_dir():
        raise LlavaError(flag, expected="a file", got=f"the folder {path}", exit_code=2)


def require_file_place(flag: str, path: Path, begins: bytes = b"") -> None:
    """Raise LlavaError (wrong usage) unless a file can be written at the path: it is no folder, is in one
    that can be written to, and replaces no file that does not begin with these bytes."""
    if path.is_dir():
        raise LlavaError(flag, expected="a file", got=f"the folder {path}", exit_code=2)
    folder = nearest_existing(path.absolute().parent)
    if not folder.is_dir():
        raise LlavaError(flag, expected="a file in a folder", got=f"one in the file {folder}", exit_code=2)
    if not path.exists() and not os.access(folder, os.W_OK):
        raise LlavaError(flag, expected="a folder that can be written to", got=folder, exit_code=2)
    if begins and path.is_file():
        with path.open("rb") as file:
            known = file.read(len(begins))
        if known and known.lower() != begins:
            got = f"{path}, which is something else"
            raise LlavaError(flag, expected="a new file, or such a one to replace", got=got, exit_code=2)
