"""Rows of feature shards that requests name in place of an image: `row:SHARD.h5/NUMBER` or `row:ID`."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Sequence

from llava_core.errors import LlavaError
from llava_core.row_status import Status
from llava_core.shards.reader import Shard

SCHEME = "row:"


class StoredRows:
    """The rows of `infer serve --features`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = {shard.path.name: shard for shard in shards}

    def find(self, url: str) -> tuple[Shard, int]:
        """Shard and number of the row that a URL names. Raises LlavaError if there is none with features."""
        name = url.removeprefix(SCHEME)
        known = re.fullmatch(r"(.+)/([0-9]{1,9})", name)
        if known and (shard := self._shards.get(known[1])):
            rows = [(shard, int(known[2]))] if int(known[2]) < shard.rows else []
        else:
            rows = self._by_id.get(name, [])
        if len(rows) != 1:
            expected = f"row:ID or row:SHARD.h5/NUMBER, such as row:{next(iter(self._shards))}/0"
            got = f"{name[:80]!r}, the id of {len(rows)} rows" if rows else repr(name[:80])
            raise LlavaError("no such row of --features", expected=expected, got=got)
        shard, row = rows[0]
        if (status := Status(int(shard.status[row]))) is not Status.OK:
            raise LlavaError(f"row {row} of {shard.path.name} has no features", got=status.label)
        return shard, row

    @functools.cached_property
    def _by_id(self) -> dict[str, list[tuple[Shard, int]]]:
        found = collections.defaultdict(list)
        for shard in self._shards.values():
            for row, identity in enumerate(shard.ids()):
                if identity:
                    found[identity].append((shard, row))
        return dict(found)
