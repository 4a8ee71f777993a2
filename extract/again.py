"""Images of rows that were extracted before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from extract.sources.find import sources_of
from llava_core.fetch import Fetched, FetchLimits, fetch_all
from llava_core.shards import Shard


def images_again(
    rows: Sequence[tuple[Shard, int]], data: str | None, images: Path | None, limits: FetchLimits
) -> list[Fetched]:
    """Local images are read from `data`, the others downloaded. Raises LlavaError as `sources_of` does."""
    shards = list(dict.fromkeys(shard for shard, _ in rows))
    sources = zip(shards, sources_of(shards, data, images), strict=True)
    local = {shard: source.read().images for shard, source in sources if source is not None}
    found = [
        store.load(row, limits.max_bytes) if (store := local.get(shard)) else None for shard, row in rows
    ]
    missing = [shard.url(row) for (shard, row), image in zip(rows, found, strict=True) if image is None]
    downloads = iter(fetch_all(missing, limits))
    return [next(downloads) if image is None else image for image in found]
