"""The folders of --features: their shards and usable rows, and names by which figures tell them apart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_core.errors import LlavaError
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import names_of, shard_paths
from llava_core.row_status import Status
from llava_core.shards.folder import find_shards, require_one_encoder
from llava_core.shards.fused import open_fused
from llava_core.shards.other_words import with_words
from llava_core.shards.reader import AT_ONCE, Shard
from llava_core.shards.row_list import RowList
from llava_core.types import Fuse


@dataclasses.dataclass(frozen=True)
class Source:
    """One folder of shards."""

    path: Path
    name: str
    """The last part of its path, or as many as tell it from the others."""
    shards: list[Shard]


def open_sources(
    folders: Sequence[Path],
    fuse: Fuse | None = None,
    like: EncoderIdentity | None = None,
    flag: str = "--features",
) -> list[Source]:
    """The folders as sources, or with `fuse` all as one, of the encoders in the order of `like`.

    Raises LlavaError if one has no shards, one is damaged, or two come from different encoders; with `fuse`
    as `open_fused`.
    """
    if fuse is not None and folders:
        shards = open_fused(folders, fuse, like, flag)
        return [Source(folders[0], " + ".join(names_of(folders)), shards)]
    sources = [
        Source(folder, name, find_shards(folder))
        for folder, name in zip(folders, names_of(folders), strict=True)
    ]
    require_one_encoder([shard for source in sources for shard in source.shards])
    return sources


def reworded(sources: Sequence[Source], pattern: str) -> list[Source]:
    """The same pictures with the words of other tables (--text)."""
    views = iter(with_words([shard for source in sources for shard in source.shards], pattern))
    return [dataclasses.replace(source, shards=[next(views) for _ in source.shards]) for source in sources]


def held_out_of(folders: Sequence[Path], held_out: Sequence[Path]) -> list[Path]:
    """The held-out folders of the encoders of `folders`. Raises LlavaError if one has none."""
    encoders = {folder: _fingerprint(folder) for folder in [*folders, *held_out]}
    chosen = [folder for folder in held_out if encoders[folder] in {encoders[own] for own in folders}]
    found = {encoders[folder] for folder in chosen}
    if lacking := [folder for folder in folders if encoders[folder] not in found]:
        raise LlavaError(
            f"--eval-features has no held-out shards of the encoder of {lacking[0]}",
            expected="a folder for each encoder of --space features",
            got=", ".join(map(str, held_out)),
        )
    return chosen


@functools.lru_cache(maxsize=256)
def _fingerprint(folder: Path) -> str:
    """The encoder's, of a folder of shards."""
    return Shard(shard_paths(folder)[0]).identity.fingerprint


def text_only_rows(shards: Sequence[Shard]) -> int:
    """How many rows are about no picture."""
    return sum(int((shard.status == Status.TEXT_ONLY).sum()) for shard in shards)


def usable_rows(
    shards: Sequence[Shard],
    limit: int,
    text: bool = False,
    drawn_by: int | None = None,
    listed: RowList | None = None,
) -> tuple[np.ndarray, bool]:
    """(shard, row) of the first `limit` rows with features and a caption, in the order of shards and rows,
    int [rows, 2], and whether one of them has a system message; with `text`, rows about no picture, too;
    with `listed`, only those that it keeps.

    With a seed, `drawn_by`, the rows are random ones, in the same order; a larger `limit` adds to them.
    """
    if drawn_by is not None:
        rows, system = usable_rows(shards, sum(shard.rows for shard in shards), text, listed=listed)
        return rows[np.sort(np.random.default_rng(drawn_by).permutation(len(rows))[:limit])], system
    statuses = [Status.OK, Status.TEXT_ONLY] if text else [Status.OK]
    found, system = [np.zeros((0, 2), np.int32)], False
    for s, shard in enumerate(shards):
        wanted = np.isin(shard.status, statuses)
        if listed is not None:
            wanted &= np.isin(np.arange(shard.rows), listed.rows_of(shard))
        for start in range(0, shard.rows, AT_ONCE):
            if limit <= 0:
                break
            stop = min(start + AT_ONCE, shard.rows)
            worded, told = shard.worded(start, stop)
            rows = np.flatnonzero(worded & wanted[start:stop])[:limit]
            found.append(np.stack([np.full(len(rows), s), rows + start], axis=1).astype(np.int32))
            system |= bool(told[rows].any())
            limit -= len(rows)
    return np.concatenate(found), system


def rows_identity(shards: Sequence[Shard], rows: np.ndarray, sizes: Sequence[int]) -> str:
    """sha256, in hex, over the shards' names and uids, (shard, row) of each row, and the sizes of several
    sources: that of their JSON text, which is in memory for one shard at a time."""
    used = [(shard.path.name, shard.layout.uid) for shard in shards]
    digest = hashlib.sha256(f"[{json.dumps(used)}, [".encode())
    comma = ""
    for part in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        if len(part):
            begins = f"[{part[0, 0]}, "
            digest.update(f"{comma}{begins}{f'], {begins}'.join(map(str, part[:, 1].tolist()))}]".encode())
            comma = ", "
    several = f", {json.dumps(sizes)}" if len(sizes) > 1 else ""
    digest.update(f"]{several}]".encode())
    return digest.hexdigest()
