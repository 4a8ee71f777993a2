"""Finds the sources that `--data` names."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from extract.sources.base import BY_NAME, DataFlags, Source, described
from extract.sources.folder import TEXT_SUFFIXES, Folder, images_of_labels
from extract.sources.table import TableSource
from extract.sources.tar import Tar
from extract.statistics import data_flags_of
from llava_core.cli.console import counted, say
from llava_core.errors import LlavaError
from llava_core.filesystem import matching
from llava_core.shards.reader import Shard
from llava_core.tables.table_files import AS_TEXT
from llava_core.tables.words import SAMPLE
from llava_core.vision.image_files import SUFFIXES

STATISTICS_HEAD = 1024
"""Bytes at the beginning of a statistics file that hold the name of its shard."""
GROUPS = ((".parquet",), (".arrow",), (".tar",), AS_TEXT)
"""Suffixes of sources in a folder; only the first kind that is there is taken."""
EVERY = tuple(suffix for group in GROUPS for suffix in group)
NOTES = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")
"""JSON files beside data sets, which `datasets` writes."""


def find_sources(data: str, flags: DataFlags = BY_NAME, limit: int | None = None) -> list[Source]:
    """Sources in a folder, at a path or of a glob, in the order of their names, cut to `limit` rows in all.

    A folder means its parquet files, or if it has none its Arrow files, tar archives, or tables as text, or
    else its images. What comes after `limit` rows is not opened. Raises LlavaError if there is no source, or
    one of these is damaged.
    """
    found = _found(data, flags)
    sources: list[Source] = []
    left = limit
    for path, prefix in found.values():
        if left == 0:
            break
        source = dataclasses.replace(_source(path, flags, left), prefix=prefix)
        if left is not None:
            source = source.first(min(source.rows, left))
            left -= source.rows
        if source.rows:
            sources.append(source)
    if not sources:
        raise LlavaError(f"no row in {data}", expected="sources with rows", got=f"{len(found)} empty ones")
    return sources


def _found(data: str, flags: DataFlags) -> dict[str, tuple[Path, str]]:
    """Paths of sources by the names of their shards, in order, and what each name begins with: the folder,
    where two sources have one name.

    Raises LlavaError if two shards would have one name all the same.
    """
    require_image_folder(flags.images)
    paths = _paths(data, flags)
    kinds = [Folder if path.is_dir() else TableSource for path in paths]
    names = [kind(path, 0, path).name for kind, path in zip(kinds, paths, strict=True)]
    often = collections.Counter(names)
    found: dict[str, tuple[Path, str]] = {}
    for path, name in zip(paths, names, strict=True):
        prefix = f"{path.absolute().parent.name}-" if often[name] > 1 else ""
        stem = prefix + name
        if stem in found:
            both = f"{found[stem][0]} and {path} would both become {stem}.h5"
            raise LlavaError(both, do="rename one of them")
        found[stem] = (path, prefix)
    return found


def sources_of(shards: Sequence[Shard], data: str | None, flags: DataFlags) -> list[Source | None]:
    """Source of each shard; None if its images are all at addresses.

    Without `data`, they are where their statistics say; only rows of these shards are read. Raises LlavaError
    if the source of a shard with local images is not there.
    """
    found: dict[object, dict[str, tuple[Path, str]]] = {}
    sources: list[Source | None] = []
    for shard in shards:
        if not shard.local:
            sources.append(None)
            continue
        given = (data, flags) if data is not None else data_flags_of(shard)
        if given not in found:
            found[given] = _found(*given)
        sources.append(_source_of(shard, found[given], *given))
    return sources


def _source_of(shard: Shard, found: dict[str, tuple[Path, str]], data: str, flags: DataFlags) -> Source:
    if shard.path.stem not in found:
        raise LlavaError(f"{shard.path} was made from {shard.source.get('name')}, which is not in {data}")
    path, prefix = found[shard.path.stem]
    source = dataclasses.replace(_source(path, flags, shard.rows), prefix=prefix)
    source = source.first(min(shard.rows, source.rows))
    if source.identity() != shard.source:
        raise LlavaError(
            f"{source.path} has changed since {shard.path} was made from it",
            expected=described(shard.source),
            got=described(source.identity()),
        )
    return source


def require_image_folder(images: Path | None) -> None:
    """Raise LlavaError unless --images is a folder; None is right."""
    if images is not None and not images.is_dir():
        raise LlavaError(f"no image folder {images}", do="correct --images")


def require_matching(data: str) -> list[Path]:
    """What lies at a path, or matches a glob. Raises LlavaError if nothing does."""
    if found := matching(data):
        return found
    raise _nothing(f"no data at {data}")


def _paths(data: str, flags: DataFlags) -> list[Path]:
    path = Path(data)
    if not path.is_dir():
        return _local_instead(require_matching(data))
    files = _files(path)
    images = {_stem(file) for file in files if file.suffix.lower() in SUFFIXES}
    captioned = any(file.suffix.lower() in TEXT_SUFFIXES and _is_beside(file, images) for file in files)
    # The words of single images, and the statistics beside a shard, are not data, wherever they lie.
    kinds = [file for file in files if file.name.lower().endswith(EVERY) and not _is_note(file, images)]
    for group in GROUPS:
        listed = [file for file in kinds if file.name.lower().endswith(group)]
        if group is GROUPS[-1] and captioned and not any(_is_table(file, flags) for file in listed):
            listed = []  # notes beside images that have their words beside them
        if listed:
            chosen = _local_instead(listed)
            taken = {*listed, *chosen}
            _mention_left_out(path, [file for file in kinds if file not in taken])
            return chosen
    _mention_left_out(path, kinds)
    return [path]


def _files(folder: Path) -> list[Path]:
    """Files in the folder and in those below it, by path; hidden ones are left out."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.parts)


def _is_table(path: Path, flags: DataFlags) -> bool:
    """Whether a file has images and words that can be read."""
    try:
        TableSource.find(path, flags, SAMPLE)
    except LlavaError:
        return False
    return True


def _mention_left_out(path: Path, files: Sequence[Path]) -> None:
    """Print how many tables and archives are not read."""
    if files:
        what = f"{counted(len(files), 'file')} of data left out, such as {files[0].name}"
        say(f"{path}: {what}; give --data the name of one to read it")


def _local_instead(paths: list[Path]) -> list[Path]:
    """img2dataset keeps its table of addresses beside the pictures that it downloaded: these are taken."""
    chosen: dict[Path, None] = {}
    local = 0
    for path in paths:
        tar, folder = path.with_suffix(".tar"), path.with_suffix("")
        if path.suffix == ".parquet" and (tar.is_file() or (folder.is_dir() and _has_images(folder))):
            path, local = tar if tar.is_file() else folder, local + 1
        chosen[path] = None
    if local:
        say(f"the images of {counted(local, 'table')} are on this disk; they are not downloaded")
    return list(chosen)


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in SUFFIXES for entry in entries)


def _stem(path: Path) -> str:
    return os.path.splitext(path)[0]


def _is_note(path: Path, images: set[str]) -> bool:
    """Whether a file holds the words of an image, notes of another tool, or the statistics of a shard."""
    if path.suffix.lower() != ".json":
        return False
    noted = path.name in NOTES or path.name.endswith("_stats.json")
    return noted or _is_beside(path, images) or _is_statistics(path)


def _is_beside(path: Path, images: set[str]) -> bool:
    """Whether a file of words lies beside its image, or in the label folder for it."""
    stems = map(_stem, (path, path.with_suffix(""), *images_of_labels(path)))
    return any(stem in images for stem in stems)


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


def _source(path: Path, flags: DataFlags, limit: int | None) -> Source:
    if path.is_dir():
        if flags.images is not None:
            got = f"a folder of images, {path}"
            raise LlavaError("--images", expected="--data of files that name images", got=got, exit_code=2)
        source = Folder.find(path, flags)
        if not source.rows:
            raise _nothing(f"nothing to extract in {path}")
        return source
    if not path.is_file():  # a pipe that nobody writes to would be waited for
        raise _nothing(f"{path} is no regular file")
    with path.open("rb") as file:
        head = file.read(262)
    return Tar.find(path, flags) if head[257:262] == b"ustar" else TableSource.find(path, flags, limit)


def _nothing(what: str) -> LlavaError:
    return LlavaError(
        what,
        expected="parquet, Arrow, JSON, CSV or tar files, or images with text files beside them "
        f"({' '.join(SUFFIXES)})",
        do="correct --data, or download the reference data with `llava download train`",
    )
