"""SHA256SUMS of a folder, in the format of `sha256sum --check`: written, read and verified."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files

SUMS = "SHA256SUMS"
RESTORE = "restore it from a copy"


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS into a folder; `sums` are sha256, in hex, by file name."""
    lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """sha256, in hex, by file name. Raises LlavaError if the list is damaged, OSError if there is none."""
    text = (folder / SUMS).read_bytes().decode("utf-8", "replace")
    lines = [re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line) for line in text.removesuffix("\n").split("\n")]
    sums = {line[2]: line[1] for line in lines if line}
    if len(sums) < len(lines):
        raise LlavaError(f"damaged {folder / SUMS}", expected="a sha256 and a name on each line", do=RESTORE)
    return sums


def require_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise LlavaError naming the first of these files that is missing or differs from SHA256SUMS."""
    sums = read_sums(folder)
    for name in names:
        try:
            now = sha256_files([folder / name])
        except OSError as error:
            raise LlavaError(f"{folder / name} cannot be read", got=error.strerror, do=RESTORE) from None
        if sums.get(name) != now:
            raise LlavaError(
                f"{folder / name} is damaged, or was edited",
                expected=f"sha256 {sums[name][:12]}…, as {SUMS} says" if name in sums else f"it in {SUMS}",
                got=f"{now[:12]}…",
                do=f"{RESTORE}; if you edited it, put the line that `sha256sum {name}` prints into {SUMS}",
            )
