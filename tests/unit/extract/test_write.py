"""When outcomes become durable, and what a failure among them leaves of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from extract.deduplicate import Deduplicator
from extract.open_shard import OpenShard
from extract.row_job import RowJob, StoredRow
from extract.stages import write
from extract.stages.write import Write
from llava_core.cli.console import progress
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from tests.support.shards import TOKENS, WIDTH, header, outcome, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[list[OpenShard]]:
    """Two shards of nine rows without an outcome."""
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(tmp_path / name, header(["a"] * 9))) for name in "ab"]
        yield [OpenShard(writer, ["http://x.org/1.jpg"] * 9, ["a"] * 9) for writer in writers]


def stage(shards: Sequence[OpenShard], disk: ThreadPoolExecutor) -> Write:
    return Write(disk, progress(18, "rows"), lambda shard, seconds: None, Deduplicator(), shards)


def test_an_outcome_waits_no_longer_though_others_never_cease(
    shards: list[OpenShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "WRITE_SECONDS", 0.0)

    async def busy() -> None:
        with ThreadPoolExecutor(1) as disk:
            writer = stage(shards, disk)
            for job in [RowJob(shards[0], outcome(0)), *(RowJob(shards[1], outcome(k)) for k in range(5))]:
                writer.inbox.put_nowait(job)
            writer.inbox.put_nowait(None)
            await writer.run()

    asyncio.run(busy())
    assert [(shard.missing, len(shard.waiting)) for shard in shards] == [(8, 0), (4, 0)]


def test_a_duplicate_of_a_damaged_row_costs_no_other_row(shards: list[OpenShard], tmp_path: Path) -> None:
    """The rows before and after it are written, and no error hides the one that ended the stages."""
    stored = Shard(write_shard(tmp_path / "stored.h5"))
    with stored.path.open("r+b") as file:
        file.seek(stored.layout.offsets["features"] + 2 * TOKENS * WIDTH * 2)
        file.write(b"\xff")
    copied = [RowJob(shards[0], outcome(k), duplicate_of=StoredRow(stored, k)) for k in (1, 2)]
    with ThreadPoolExecutor(1) as disk:
        writer = stage(shards, disk)
        for job in (RowJob(shards[0], outcome(0)), *copied, RowJob(shards[1], outcome(0))):
            writer.inbox.put_nowait(job)
        writer.flush()
    assert [shard.missing for shard in shards] == [7, 8]
    assert shards[0].writer.done.tolist() == [True] * 2 + [False] * 7
