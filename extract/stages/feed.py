"""Feed: opens the shards one after the other, and hands out their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from extract.deduplicate import Deduplicator
from extract.open_output import OpenOutput
from extract.row_job import RowJob, RowRef, StoredRow
from extract.stages.host_queue import HostQueue
from extract.stages.write import Write
from llava_core.errors import LlavaError
from llava_core.row_status import Outcome, Status
from llava_core.shards.part_file import FinishedMeanwhile
from llava_core.shards.writer import RowRecord


class Feed:
    """Rows with an image go to `out`; rows without a caption, and duplicates, go straight to `write`.

    Shards of one source in several caches are opened together, so that each of its images is downloaded once.
    A shard that cannot be opened is the last one: the shards before it are finished, and `error` says why.
    """

    def __init__(
        self,
        openers: Sequence[Sequence[Callable[[], OpenOutput]]],
        out: HostQueue[tuple[RowRef, ...]],
        write: Write,
        deduplicator: Deduplicator,
        rows_ahead: int,
    ) -> None:
        """`openers`: of each source, those of its shards; `rows_ahead`: rows ready for download above which
        no further shard is opened.
        """
        self.openers, self.out, self.write, self.rows_ahead = openers, out, write, rows_ahead
        self.deduplicator = deduplicator
        self.error: LlavaError | OSError | None = None

    async def run(self) -> None:
        for openers in self.openers:
            await self.out.startable_below(self.rows_ahead)
            shards = []
            try:
                for opener in openers:
                    with contextlib.suppress(FinishedMeanwhile):
                        shards.append(await self.write.open(opener))
            except (LlavaError, OSError) as error:
                self.error = error
                break
            await self._hand_out(shards)
            for shard in shards:
                if not shard.pending:
                    await self.write.write(shard)
        self.out.close()

    async def _hand_out(self, shards: Sequence[OpenOutput]) -> None:
        needed: dict[int, list[RowRef]] = {}
        for shard in shards:
            self.deduplicator.add_open(shard)
            for row in shard.pending:
                if job := self._settled(shard, row):
                    await self.write.inbox.put(job)
                else:
                    needed.setdefault(row, []).append(RowRef(shard, row))
        for row, refs in needed.items():
            self.out.put(refs[0].shard.host(row), tuple(refs))

    def _settled(self, shard: OpenOutput, row: int) -> RowJob | None:
        """The job of a row that needs no image; None if it needs one."""
        known = shard.outcomes.get(row)
        if known is None and shard.captions[row] is None:
            known = Outcome(Status.BAD_CAPTION)
        if known is not None:
            return RowJob(shard, RowRecord(row, known.status, reason=known.reason))
        if (old := shard.kept.get(row)) and old.check(row):
            record = RowRecord(row, Status.PENDING, attempts=int(old.attempts[row]))
            record.mtime = int(old.mtime[row])
            return RowJob(shard, record, duplicate_of=StoredRow(old, row))
        if shard.host(row) is not None and (
            found := self.deduplicator.claim(shard.urls[row], RowRef(shard, row))
        ):
            return RowJob(shard, RowRecord(row, Status.PENDING), duplicate_of=found)
        return None
