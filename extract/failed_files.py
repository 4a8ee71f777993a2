"""The first failed rows of each outcome by name: files, and rows whose words or images have to be changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from extract.sources.base import is_address
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.types import JsonDict

NAMED, NAME_WIDTH = 3, 80
"""Rows of an outcome that are named, and the most characters of a name."""


def failed_files(shards: Sequence[Shard]) -> dict[str, dict[str, int]]:
    """{outcome: {name: 1}} of up to NAMED rows; the name is the path, or SHARD:ROW for want of one.

    Failed downloads are left out: their hosts are counted, and addresses may hold passwords.
    """
    named: dict[str, dict[str, int]] = {}
    for shard in shards:
        for status in map(Status, np.unique(shard.status).tolist()):
            if not status.failed or not (shard.local or status.in_data):
                continue
            files = named.setdefault(status.label, {})
            for row in np.flatnonzero(shard.status == status).tolist():
                if len(files) == NAMED:
                    break
                url = shard.url(row)
                if status.in_data or not is_address(url):
                    files[_name(shard, row, url)] = 1
    return {label: files for label, files in named.items() if files}


def failed_lines(figures: JsonDict) -> list[str]:
    """A line for each outcome: 'no file: a.jpg, b.jpg, c.jpg, …'."""
    lines = []
    for label, files in figures["failed_files"].items():
        names = list(files)[:NAMED]
        lines.append(f"{label}: {', '.join(names)}" + ", …" * (figures["by_status"][label] > len(names)))
    return lines


def _name(shard: Shard, row: int, url: str) -> str:
    if not url or is_address(url):
        return f"{shard.path.name}:{row}"
    return url if len(url) <= NAME_WIDTH else f"…{url[-NAME_WIDTH:]}"
