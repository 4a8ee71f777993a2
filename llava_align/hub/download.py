"""`llava download`: the reference models and data set, through ModelScope's own client.

The client keeps complete files and resumes partial ones, so that the same command continues.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_align.hub.client import cure, open_modelscope
from llava_align.hub.config import DownloadConfig
from llava_core.cli.console import counted, human_bytes, say, show, table, visible
from llava_core.cli.translation import translated
from llava_core.errors import LlavaError, reason
from llava_core.filesystem import nearest_existing
from llava_core.types import JsonDict

PAGE = 100
"""Files per page when the files of a data set are listed."""


@dataclasses.dataclass(frozen=True)
class Download:
    """A repository on ModelScope, or the files in it that match a pattern."""

    kind: str
    """model or dataset"""
    repository: str
    folder: str
    """Destination, below --out."""
    pattern: str = "*"


DATA = "Tongyi-DataEngine/SA1B-Dense-Caption"
DOWNLOADS = {
    "models": (
        Download("model", "iic/multi-modal_clip-vit-base-patch16_zh", "models/clip"),
        Download("model", "Qwen/Qwen3-0.6B", "models/qwen3"),
    ),
    "train": (Download("dataset", DATA, "sa1b", "data/train-000*"),),
    "eval": (Download("dataset", DATA, "sa1b-eval", "data/train-0010*"),),
}
EXTRACT = "python -m extract run --vision {out}/models/clip"
NEXT = {
    "models": "python -m llava_align download train --out {out}",
    "train": f"{EXTRACT} --data {{out}}/sa1b --limit 100000 --out features/train",
    "eval": f"{EXTRACT} --data {{out}}/sa1b-eval --limit 2000 --out features/eval",
}


def run(config: DownloadConfig) -> JsonDict:
    """Print sizes, download, print the next command; returns folders and bytes."""
    downloads = DOWNLOADS[config.what]
    if config.include:
        downloads = tuple(dataclasses.replace(each, pattern=config.include) for each in downloads)
    client = open_modelscope("downloading")
    say(f"asking {client.endpoint} what there is (a minute or more, if nothing answers)")
    sizes = [_sizes(client, download) for download in downloads]
    folders = [config.out / download.folder for download in downloads]
    missing = [_missing(folder, of) for folder, of in zip(folders, sizes, strict=True)]
    free = shutil.disk_usage(nearest_existing(config.out)).free
    rows = [
        (f"{d.repository} {d.pattern}", folder, counted(len(of), "file"), human_bytes(sum(of.values())),
         human_bytes(left))
        for d, folder, of, left in zip(downloads, folders, sizes, missing, strict=True)
    ]  # fmt: skip
    show(table(rows, ("from ModelScope", "to", "files", "bytes", "still to come")))
    show(translated(f"free on that disk: {human_bytes(free)}"))
    if sum(missing) > free:
        raise LlavaError(
            f"too little space in {config.out}",
            expected=f"{human_bytes(sum(missing))} free",
            got=human_bytes(free),
            do="choose another --out, or some of the files with --include",
        )
    summary = {"folders": [str(folder) for folder in folders], "bytes": sum(map(_total, sizes))}
    if config.dry_run:
        return {**summary, "missing": sum(missing)}
    for download, folder in zip(downloads, folders, strict=True):
        _download(client, download, folder)
    for folder, of in zip(folders, sizes, strict=True):
        if left := _missing(folder, of):
            raise LlavaError(f"{folder} lacks {human_bytes(left)}", do="the same command continues")
    summary["next"] = NEXT[config.what].format(out=shlex.quote(str(config.out)))
    show(translated(f"\nnext:  {summary['next']}"))
    return {**summary, "missing": 0}


def _sizes(client: Any, download: Download) -> dict[str, int]:
    """Bytes of every matching file by its path in the repository. Raises LlavaError if there is none."""
    try:
        if download.kind == "model":
            files = client.get_model_files(download.repository, recursive=True)
        else:
            files = [file for page in _pages(client, download.repository) for file in page]
    except Exception as error:  # versions of the client raise OSError, RuntimeError and their own kinds
        raise _failed(client, download, error) from None
    sizes = {
        str(file["Path"]): int(file["Size"] or 0)
        for file in files
        if file.get("Type") != "tree" and fnmatch.fnmatch(file["Path"], download.pattern)
    }
    for name in sizes:
        if name.startswith("/") or ".." in name.split("/") or visible(name) != name:
            do = "look at that repository before you trust it"
            raise LlavaError(f"{download.repository} has a file that would land elsewhere", got=name, do=do)
    if not sizes:
        what = f"no file of {download.repository} is called {download.pattern}"
        raise LlavaError(what, do="name files that it has with --include")
    return sizes


def _pages(client: Any, repository: str) -> Iterator[Sequence[JsonDict]]:
    owner, name = repository.split("/")
    number = 1
    while True:
        where = {"root_path": "/", "recursive": True, "page_number": number, "page_size": PAGE}
        if hasattr(client, "get_dataset_files"):
            files = client.get_dataset_files(repository, revision="master", **where)
        else:  # an older modelscope
            answer = client.list_repo_tree(dataset_name=name, namespace=owner, revision="master", **where)
            files = answer["Data"]["Files"]
        yield files
        if len(files) < PAGE:
            return
        number += 1


def _download(client: Any, download: Download, folder: Path) -> None:
    from modelscope.hub.snapshot_download import dataset_snapshot_download, snapshot_download

    fetch = snapshot_download if download.kind == "model" else dataset_snapshot_download
    try:
        fetch(download.repository, local_dir=str(folder), allow_patterns=[download.pattern])
    except Exception as error:
        raise _failed(client, download, error) from None


def _failed(client: Any, download: Download, error: Exception) -> LlavaError:
    return LlavaError(
        f"cannot download {download.repository} from {client.endpoint}",
        got=reason(error),
        do=cure(error)
        or "check the network, or name a mirror in MODELSCOPE_ENDPOINT; the same command continues",
    )


def _missing(folder: Path, sizes: dict[str, int]) -> int:
    """Bytes of the files that are missing or incomplete."""
    paths = {name: folder / name for name in sizes}
    return sum(
        size
        for name, size in sizes.items()
        if not paths[name].is_file() or paths[name].stat().st_size != size
    )


def _total(sizes: dict[str, int]) -> int:
    return sum(sizes.values())
