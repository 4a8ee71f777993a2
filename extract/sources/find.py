"""Finds the sources that `--data` names."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from extract.sources import llava_json
from extract.sources.base import Source
from extract.sources.folder import Folder
from extract.sources.llava_json import LlavaJson
from extract.sources.parquet import Parquet
from llava_core.errors import LlavaError
from llava_core.shards.reader import Shard
from llava_core.vision.image_files import SUFFIXES

STATISTICS_HEAD = 1024
"""Bytes at the beginning of a statistics file that hold the name of its shard."""


def find_sources(data: str, images: Path | None = None, limit: int | None = None) -> list[Source]:
    """Sources in a folder, at a path or of a glob, in the order of their names, cut to `limit` rows in all.

    A folder means its parquet files, or if it has none its JSON files, or else its images. Raises LlavaError
    if there is no source, one is damaged, or two have the same stem and so would share a shard.
    """
    if images is not None and not images.is_dir():
        raise LlavaError(f"no image folder {images}", do="correct --images")
    found = [_source(path, images) for path in _paths(data)]
    stems: dict[str, Path] = {}
    sources: list[Source] = []
    for source in found:
        if source.stem in stems:
            raise LlavaError(
                f"{stems[source.stem]} and {source.path} would both become {source.stem}.h5",
                do="rename one of them",
            )
        stems[source.stem] = source.path
        rows = source.rows
        if limit is not None:
            rows = min(rows, limit - sum(earlier.rows for earlier in sources))
        if rows:
            sources.append(source.first(rows))
    if not sources:
        raise LlavaError(f"no row in {data}", expected="sources with rows", got=f"{len(found)} empty ones")
    return sources


def sources_of(shards: Sequence[Shard], data: str | None, images: Path | None) -> list[Source | None]:
    """Source of each shard; None if its images are all at addresses.

    Raises LlavaError if the source of a shard with local images is not in `data`.
    """
    if not any(shard.local for shard in shards):
        return [None] * len(shards)
    local = next(shard for shard in shards if shard.local)
    if data is None:
        raise LlavaError(f"{local.path} was made from local images", do="give --data as to `extract run`")
    stems = {source.stem: source for source in find_sources(data, images)}
    return [_source_of(shard, stems, data) if shard.local else None for shard in shards]


def _source_of(shard: Shard, stems: dict[str, Source], data: str) -> Source:
    if (source := stems.get(shard.path.stem)) is None:
        raise LlavaError(f"{shard.path} was made from {shard.source.get('name')}, which is not in {data}")
    source = source.first(min(shard.rows, source.rows))
    if source.identity() != shard.source:
        raise LlavaError(
            f"{source.path} has changed since {shard.path} was made from it",
            expected=shard.source,
            got=source.identity(),
        )
    return source


def matching(data: str) -> list[Path]:
    """The file or folder at a path, or the matches of a glob. Raises LlavaError if there are none."""
    path = Path(data)
    found = [path] if path.exists() else sorted(map(Path, glob.glob(data, recursive=True)))
    if not found:
        raise _nothing(f"no data at {data}")
    return found


def _paths(data: str) -> list[Path]:
    path = Path(data)
    if not path.is_dir():
        return matching(data)
    files = [file for file in sorted(path.rglob("*")) if _is_listed(file.relative_to(path))]
    parquet = [file for file in files if file.suffix == ".parquet"]
    # The statistics beside a shard are not data, wherever --out lies.
    listed = [file for file in files if not _is_statistics(file)]
    return parquet or listed or [path]


def _is_listed(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix in (".parquet", *llava_json.SUFFIXES)


def _is_statistics(path: Path) -> bool:
    """Whether a JSON file is the statistics of a shard, even of one that is gone."""
    if any(path.with_suffix(suffix).exists() for suffix in (".h5", ".h5.part")):
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(STATISTICS_HEAD)
    except OSError:
        return False
    shard = json.dumps(f"{path.stem}.h5", ensure_ascii=False)
    return head.startswith(b"{") and b'"tool_version"' in head and f'"shard": {shard}'.encode() in head


def _source(path: Path, images: Path | None) -> Source:
    if path.is_dir():
        if images is not None:
            got = f"a folder of images, {path}"
            raise LlavaError("--images", expected="--data of files that name images", got=got, exit_code=2)
        source = Folder.find(path)
        if not source.rows:
            raise _nothing(f"nothing to extract in {path}")
        return source
    if not path.is_file():  # a pipe that nobody writes to would be waited for
        raise _nothing(f"{path} is no regular file")
    if path.suffix in llava_json.SUFFIXES:
        return LlavaJson.find(path, images or path.parent)
    return Parquet.find(path, images or path.parent)


def _nothing(what: str) -> LlavaError:
    return LlavaError(
        what,
        expected=f"parquet or LLaVA JSON files, or images ({' '.join(SUFFIXES)}) with captions",
        do="correct --data, or download the data as README.md shows",
    )
