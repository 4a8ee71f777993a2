"""The folder that `llava export` writes: enough space, all files or none."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from llava_core.cli.console import human_bytes, say, show
from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import Lock, nearest_existing


def require_space(out: Path, size: int, dtype: str, dry_run: bool) -> None:
    """Print the space that `size` bytes of weights need. Raises LlavaError if the disk has less."""
    place = nearest_existing(out.absolute().parent)
    free = shutil.disk_usage(place).free
    say(f"{human_bytes(size)} of weights in {dtype}; {human_bytes(free)} free on that disk")
    if size > free and not dry_run:
        raise LlavaError(f"too little space in {place}", expected=human_bytes(size), got=human_bytes(free))


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under a temporary name, which becomes `out` if the block ends without an error, and is removed
    otherwise. Raises LlavaError if it cannot be written, or if the temporary name is somebody else's."""
    place = out.resolve()  # "." has no name, and a link is no folder
    partial, ours = place.with_name(place.name + ".part"), place.with_name(place.name + ".lock").exists()
    with Lock(place):
        if partial.exists() and not ours:  # a killed export leaves its lock, too
            do = "move it away, or give another --out"
            raise LlavaError(f"{partial} is there already", expected="a name to write under", do=do)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if place.exists():
                place.rmdir()
            partial.rename(place)
        except BaseException as error:
            shutil.rmtree(partial)  # which may have filled the disk
            if isinstance(error, (OSError, SafetensorError)):  # some name neither file nor folder
                do = "free some space, or give --out on another disk"
                raise LlavaError(f"cannot write {out}", got=first_line(error), do=do) from None
            raise
    show(out)


def copy_licences(folders: Mapping[str, Path], out: Path) -> list[str]:
    """Copy the models' licence files as LICENSE-vision and LICENSE-llm; returns the names."""
    copied = []
    for part, folder in folders.items():
        for path in sorted(folder.glob("LICENSE*"))[:1]:
            shutil.copyfile(path, out / f"LICENSE-{part}")
            copied.append(f"LICENSE-{part}")
    return copied
