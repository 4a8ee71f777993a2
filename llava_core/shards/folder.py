"""Opening a folder of feature shards, all of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_core.cli.console import say
from llava_core.input_folders import shard_paths
from llava_core.shards.reader import Shard


def open_shards(path: Path) -> list[Shard]:
    """The shards of a folder, by name, or the one shard at `path`.

    Raises LlavaError if there are none, one is damaged, or two come from different encoders.
    """
    shards = find_shards(path)
    require_one_encoder(shards)
    return shards


def find_shards(path: Path) -> list[Shard]:
    """As `open_shards`, but encoders may differ. Raises LlavaError if there are none, or one is damaged."""
    paths = shard_paths(path)
    shards = [Shard(p) for p in paths]
    if path.is_dir() and (left := len({p.with_suffix("") for p in path.glob("*.h5.part")} - set(paths))):
        say(f"{left} unfinished shards in {path} are left out")
    return shards


def require_one_encoder(
    shards: Sequence[Shard],
    do: str = "train on one kind at a time, or on several of the same rows with --fuse",
) -> None:
    """Raise LlavaError naming two files and the key that differs unless all features are of one encoder."""
    for shard in shards[1:]:
        shards[0].identity.require_same(
            shard.identity,
            f"{shards[0].path} and {shard.path} hold features of different encoders",
            do=do,
        )
