"""The unfinished file of a shard: its name, and how it comes to be, whole or not at all.

x.h5.part.tmp   being created; worthless after a crash
x.h5.part       created; HDF5 never opens it for writing again
x.h5.journal    rows that are finished in it (llava_core.shards.journal)
x.h5.lock       the process that writes
x.h5            finished
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_core.cli.console import human_bytes
from llava_core.errors import LlavaError
from llava_core.filesystem import fsync
from llava_core.row_status import Failure
from llava_core.shards.byte_offsets import columns
from llava_core.shards.hdf5_file import ShardHeader, create_file, read_layout
from llava_core.shards.journal import record_type, write_file
from llava_core.shards.reader import Shard


class FinishedMeanwhile(Exception):
    """Another process has finished the shard in the meantime."""


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def is_finished(path: Path) -> bool:
    """Whether `path` is whole, and is neither being retried nor being replaced by one with other words."""
    return path.exists() and not part_of(path).exists()


def create_part(path: Path, header: ShardHeader) -> None:
    """Create the part of a new shard, or of one that is to replace a finished shard.

    Raises LlavaError if the disk is too small.
    """
    texts = itertools.chain(header.captions, header.urls, header.ids)
    text_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    require_space(path, header.disk_bytes + text_bytes)
    with _whole(path) as partial:
        create_file(partial, header)
        if path.exists():  # beside a finished shard, a part has a journal from birth
            layout = read_layout(partial)
            write_file(journal_of(path), layout.uid, layout.version, np.zeros(0, record_type(layout.version)))


def copy_to_part(path: Path, retry: Sequence[Failure] | np.ndarray) -> None:
    """Copy a finished shard to a part in which these rows are pending: with these failures, or a mask [N]."""
    shard = Shard(path)
    version = shard.layout.version
    records = np.zeros(shard.rows, record_type(version))
    records["row"] = np.arange(shard.rows)
    for name in columns(version):
        records[name] = getattr(shard, "checksums" if name == shard.layout.checksum else name)
    pending = retry if isinstance(retry, np.ndarray) else shard.failed(retry)
    require_space(path, path.stat().st_size)
    with _whole(path) as partial:
        shutil.copyfile(path, partial)
        # The journal first: alone it means nothing, while a part alone would start from nothing.
        write_file(journal_of(path), shard.layout.uid, version, records[~pending])


def require_space(path: Path, needed: int) -> None:
    """Raise LlavaError unless this many bytes are free where `path` is to be."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise LlavaError(
            f"not enough disk space for {path}",
            expected=human_bytes(needed),
            got=f"{human_bytes(free)} free",
            do="free some, choose another folder, or take fewer rows with --limit",
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file that becomes the part once it is whole and on disk."""
    part = part_of(path)
    partial = part.with_name(part.name + ".tmp")
    try:
        yield partial
        fsync(partial)
    except Exception:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(part)
    fsync(path.parent)
