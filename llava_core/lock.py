"""One writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from llava_core.errors import LlavaError
from llava_core.files import tolerated


def flock(descriptor: int, path: Path, operation: int) -> None:
    """`fcntl.flock`, if the file system has it. Raises BlockingIOError as that does."""
    with tolerated(path, without_locks):
        fcntl.flock(descriptor, operation)


def without_locks(folder: Path, reason: str) -> str:
    """The warning about a file system that cannot lock."""
    return f"{folder}: its file system has no locks ({reason}); let only one process at a time write there"


class Held(LlavaError):
    """Another process writes it."""


class Lock:
    """Keeps other processes from writing `what`, by a lock on the file `what`.lock, which says who holds it.

    The kernel drops it when its holder dies. Raises Held, naming the holder, if there is one.
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
