"""The folder of a sweep, shared by all processes that work on it.

sweep.yaml        what is varied, and the flags that all trials share
study.journal     trials: values, held-out losses and outcomes (Optuna's format)
trials/0003/      one run each (train.run_folder)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import flock, replace_text, tolerated, without_flush
from llava_core.types import JsonDict
from train.flags import BEFORE
from train.run_folder import moved_of


class FileLock(JournalFileOpenLock):
    """A lock file that waits for its holder; unlike Optuna's own it ends with a process that is killed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path, self.descriptor = path, -1

    def acquire(self) -> bool:
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        flock(self.descriptor, self.path, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Journal(JournalFileBackend):
    """Optuna's journal file, on file systems that cannot flush, too."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with tolerated(Path(self._file_path), without_flush):  # what is written by then
            super().append_logs(logs)


def open_journal(folder: Path) -> optuna.Study:
    """The study in a sweep's folder, new or as it was left; the caller holds `study.lock`."""
    journal = folder / "study.journal"
    with FileLock(folder / "journal.lock"):
        _cut_torn_line(journal)
    backend = Journal(str(journal), lock_obj=FileLock(folder / "journal.lock"))
    try:
        storage = JournalStorage(backend)
        return optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
    except (ValueError, LookupError, TypeError) as error:
        do = "move it away: the same command then takes what the folders of its trials hold"
        raise LlavaError(f"{journal} is damaged", got=first_line(error), do=do) from None


def require_same(folder: Path, contents: JsonDict) -> bool:
    """Record space and common flags; raises LlavaError if the folder's sweep has others.

    Returns whether folders have other names than when it began, so that their contents must be compared.
    """
    path = folder / "sweep.yaml"
    if not path.exists():
        if (folder / "training_config.yaml").exists():
            raise LlavaError(f"{folder} holds a run", do="choose another --out")
        if (folder / "study.journal").exists():
            raise LlavaError(f"{path} of this sweep is gone", do="restore it, or choose another --out")
        replace_text(path, yaml.safe_dump(contents, allow_unicode=True, sort_keys=False))
        return False
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        flags = {key: read["flags"].get(key, BEFORE.get(key)) for key in contents["flags"]}
        before = {"space": dict(read["space"]), "flags": flags}
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        do = "restore it, or choose another --out"
        raise LlavaError(f"{path} is damaged", got=first_line(error), do=do) from None
    moved = moved_of(flags, contents["flags"])
    for part, prefix in (("space", "--space "), ("flags", "--")):
        for key in {**before[part], **contents[part]}:
            old, new = before[part].get(key), contents[part].get(key)
            if old != new and (part == "space" or key not in moved):
                raise LlavaError(
                    f"{folder} holds a sweep with another {prefix}{key.replace('_', '-')}",
                    expected="none" if old is None else old,
                    got="none" if new is None else new,
                    do="choose another --out: what is drawn next, and the table, are of one space",
                )
    return bool(moved)


def _cut_torn_line(journal: Path) -> None:
    """Drop an unfinished last line, as a loss of power leaves it."""
    with contextlib.suppress(FileNotFoundError), journal.open("rb+") as file:
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's warnings of what is meant here, such as a report repeated after a resume."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
