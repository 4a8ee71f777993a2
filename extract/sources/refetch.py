"""Images of rows that were extracted before: read or downloaded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extract.sources.base import DataFlags
from extract.sources.find import sources_of
from llava_core.network.fetch import Fetched, fetch_all
from llava_core.network.fetch_limits import FetchLimits
from llava_core.shards.reader import Shard


class ImageRefetcher:
    """Reads local images from `data` and downloads the others. Raises LlavaError as `sources_of` does."""

    def __init__(self, shards: Sequence[Shard], data: str | None, flags: DataFlags) -> None:
        shards = list(dict.fromkeys(shards))
        sources = zip(shards, sources_of(shards, data, flags), strict=True)
        self._local = {shard: source.read().images for shard, source in sources if source is not None}

    def load(
        self, rows: Sequence[tuple[Shard, int]], limits: FetchLimits, done: Callable[[], object]
    ) -> list[Fetched]:
        """Images in the order of `rows`; `done` is called after each."""
        found: list[Fetched | None] = []
        for shard, row in rows:
            images = self._local.get(shard)
            found.append(images.load(row, limits.max_bytes) if images else None)
            if found[-1]:
                done()
        missing = [shard.url(row) for (shard, row), image in zip(rows, found, strict=True) if image is None]
        downloads = iter(fetch_all(missing, limits, done))
        return [image or next(downloads) for image in found]
