"""Caches of the same pictures, made in different ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_core.shards.reader import Shard


def flags_of(data: Path) -> tuple[object, ...]:
    """Flags with which a picture's features do not depend on what is encoded beside it."""
    return ("--data", data, "--allow-private", "--batch-size", 1, "--thumbnails", "--max-failed", 1,
            "--retries", 0)  # fmt: skip


def same_shards(one: Path, other: Path) -> None:
    a, b = Shard(one), Shard(other)
    assert a.layout.identity == b.layout.identity
    assert a.status.tolist() == b.status.tolist()
    assert [a.dialogue(row) for row in range(a.rows)] == [b.dialogue(row) for row in range(b.rows)]
    assert a.sha256[a.ok_rows()].tolist() == b.sha256[b.ok_rows()].tolist()
    for row in a.ok_rows():
        assert a.check(row)
        assert a.thumbnail(row) == b.thumbnail(row)
        assert np.array_equal(a.read(row), b.read(row)), (one, row)
