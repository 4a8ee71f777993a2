"""A folder of feature shards: found, opened, and of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_core.console import say
from llava_core.errors import LlavaError
from llava_core.shards import Shard


def open_shards(path: Path) -> list[Shard]:
    """The shards of a folder in the order of their names, or the one at a path; all of one encoder.

    Raises LlavaError if there are none, one is damaged, or two come from different encoders.
    """
    shards = find_shards(path)
    require_one_encoder(shards)
    return shards


def find_shards(path: Path) -> list[Shard]:
    """As `open_shards`, of whatever encoders. Raises LlavaError if there are none, or one is damaged."""
    if not path.exists():
        raise LlavaError(f"no feature folder {path}", do="make it with `extract run --out`")
    if path.is_file() and path.suffix != ".h5":
        raise LlavaError(f"{path} is no feature shard", expected="a folder of *.h5 files, or one of them")
    paths = [path] if path.is_file() else sorted(path.glob("*.h5"))
    if not paths and (below := sorted({shard.parent for shard in path.glob("*/*.h5")})):
        raise LlavaError(f"no shard (*.h5) in {path}", do=f"give one of {', '.join(map(str, below[:5]))}")
    if not paths:
        unfinished = sorted(path.glob("*.h5.part"))
        raise LlavaError(
            f"no finished shard (*.h5) in {path}",
            got=f"{len(unfinished)} unfinished, such as {unfinished[0].name}" if unfinished else None,
            do="run `extract run` again to finish them"
            if unfinished
            else "make some with `extract run --out`",
        )
    shards = [Shard(p) for p in paths]
    if path.is_dir() and (left := len({p.with_suffix("") for p in path.glob("*.h5.part")} - set(paths))):
        say(f"{left} unfinished shards in {path} are left out")
    return shards


def require_one_encoder(shards: Sequence[Shard]) -> None:
    """Raise LlavaError naming two files and the key that differs unless all features are of one encoder."""
    for shard in shards[1:]:
        shards[0].identity.require_same(
            shard.identity,
            f"{shards[0].path} and {shard.path} hold features of different encoders",
            do="train on one kind at a time",
        )
