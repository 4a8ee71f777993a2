"""Caches of the same rows by several encoders, or of several layers, read as one (`--fuse`)."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.fusion import FusedIdentity
from llava_core.identity import EncoderIdentity
from llava_core.input_folders import shard_paths
from llava_core.row_status import Status
from llava_core.shards.folder import find_shards, require_one_encoder
from llava_core.shards.reader import Shard
from llava_core.types import Fuse


class FusedShard(Shard):
    """A shard with the features of several, and the texts and columns of one of them."""

    def __init__(self, base: Shard, parts: Sequence[Shard], identity: FusedIdentity) -> None:
        """`parts`, of which `base` has the texts, are of the same rows, in the order of the identity's."""
        vars(self).update(vars(copy.copy(base)))
        self.parts, self.identity, self._fusion = tuple(parts), identity, identity.fusion
        self.tokens, self.width = self._fusion.tokens, self._fusion.width
        self.row_bytes = sum(part.row_bytes for part in parts)
        self.encoder, self.preprocess = identity.encoder, identity.preprocess
        uids = " ".join([identity.kind, *(part.layout.uid for part in parts)])
        self.layout = dataclasses.replace(self.layout, uid=hashlib.sha256(uids.encode()).hexdigest())
        self.status = parts[0].status.copy()
        for part in parts[1:]:  # a row has features where all have some, else the first failure
            failed = (self.status == Status.OK) & (part.status != Status.OK)
            self.status[failed] = part.status[failed]

    @property
    def uids(self) -> list[str]:
        return [part.layout.uid for part in self.parts]

    def read_into(self, row: int, out: np.ndarray) -> None:
        if self._fusion.kind == "tokens":
            out[:] = 0  # beside the narrower encoders
        for k, part in enumerate(self.parts):
            self._fusion.put(k, part.read(row), out)


def open_fused(
    folders: Sequence[Path], kind: Fuse, like: EncoderIdentity | None = None, flag: str = "--features"
) -> list[Shard]:
    """The shards of several folders, fused by name, in the order of the folders, or as in `like`.

    The texts are those of the first folder. Prints how many rows have failed in some of the folders alone,
    and how many have other texts in another folder. Raises LlavaError if a shard is damaged,
    they do not hold the same rows, or their encoders are not those of `like`, or do not fit together.
    """
    caches = [find_shards(folder) for folder in folders]
    for shards in caches:
        require_one_encoder(shards)
    given = [shards[0].identity for shards in caches]
    order = list(range(len(caches)))
    if isinstance(like, FusedIdentity):
        order = like.places_of(given, flag)
    identity = FusedIdentity.of(kind, [given[k] for k in order])
    for folder, shards in zip(folders[1:], caches[1:], strict=True):
        _require_same_shards(folders[0], caches[0], folder, shards)
    fused, partly, reworded = list[Shard](), 0, 0
    for own in zip(*caches, strict=True):
        texts = [own[0].captions()]
        for part in own[1:]:
            _require_same_rows(own[0], part)
            texts.append(part.captions())
        reworded += sum(len(set(row)) > 1 for row in zip(*texts, strict=True))
        parts = [own[k] for k in order]
        ok = np.stack([part.status == Status.OK for part in parts])
        partly += int((ok.any(0) & ~ok.all(0)).sum())
        fused.append(FusedShard(own[0], parts, identity))
    if like is None and (lacking := identity.without_class_token):
        say(f"class token of {', '.join(lacking)} left out, since another encoder has none")
    if partly:
        say(f"{counted(partly, 'row')} failed in some of {', '.join(map(str, folders))}: left out in all")
    if reworded:
        rows = counted(reworded, "row")
        say(f"{rows} with other texts in some of the folders: those of {folders[0]} are read")
    return fused


def require_each_encoder(folders: Sequence[Path], trained: FusedIdentity, flag: str) -> None:
    """Raise LlavaError unless there is a folder of shards of each encoder."""
    trained.places_of([Shard(shard_paths(folder)[0]).identity for folder in folders], flag)


def _require_same_shards(first: Path, shards: Sequence[Shard], other: Path, others: Sequence[Shard]) -> None:
    names, theirs = ([shard.path.name for shard in each] for each in (shards, others))
    if names != theirs:
        lacking = sorted({*names} ^ {*theirs})[0]
        folder, have = (other, first) if lacking in names else (first, other)
        raise LlavaError(
            f"{first} and {other} are not of the same rows",
            expected=f"the same shards in each, for --fuse: {lacking} of {have}",
            got=f"none of that name in {folder}",
            do="extract the same data with each encoder",
        )


def _require_same_rows(first: Shard, other: Shard) -> None:
    """Raise LlavaError unless both are of the same pictures, row by row: by sha256, or id and address."""
    what = f"{first.path} and {other.path} are not of the same rows"
    do = "extract the same data with each encoder"
    if first.rows != other.rows:
        raise LlavaError(what, expected=counted(first.rows, "row"), got=f"{other.rows:,}", do=do)
    both = (first.status == Status.OK) & (other.status == Status.OK)
    unlike = both & (first.sha256 != other.sha256).any(1)
    if (both & first.sha256.any(1)).any() and not unlike.any():
        return  # ids and addresses are others in a tar of the same files
    for name, mine, theirs in (("id", first.ids(), other.ids()), ("url", first.urls(), other.urls())):
        if mine != theirs:
            row = next(k for k in range(first.rows) if mine[k] != theirs[k])
            got = f"{theirs[row] or 'none'} as the {name} of row {row}"
            raise LlavaError(what, expected=mine[row] or "none", got=got, do=do)
    if unlike.any():
        row = int(unlike.argmax())
        raise LlavaError(
            what,
            expected=f"row {row} of an image file of sha256 {first.sha256[row].tobytes().hex()[:12]}…",
            got=f"{other.sha256[row].tobytes().hex()[:12]}…",
            do=do,
        )
