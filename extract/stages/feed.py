"""Feed: opens the shards one after the other, and hands out their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from extract.deduplicate import Deduplicator
from extract.open_shard import OpenShard
from extract.row_job import RowJob, RowRef, StoredRow
from extract.stages.host_queue import HostQueue
from extract.stages.write import Write
from llava_core.errors import LlavaError
from llava_core.row_status import Outcome, Status
from llava_core.shards.part_file import FinishedMeanwhile
from llava_core.shards.writer import RowRecord


class Feed:
    """Rows with an image go to `out`; rows without a caption, and duplicates, go straight to `write`.

    A shard that cannot be opened is the last one: the shards before it are finished, and `error` says why.
    """

    def __init__(
        self,
        openers: Sequence[Callable[[], OpenShard]],
        out: HostQueue[RowRef],
        write: Write,
        deduplicator: Deduplicator,
        rows_ahead: int,
    ) -> None:
        """`rows_ahead`: rows ready for download above which no further shard is opened."""
        self.openers, self.out, self.write, self.rows_ahead = openers, out, write, rows_ahead
        self.deduplicator = deduplicator
        self.error: LlavaError | OSError | None = None

    async def run(self) -> None:
        for opener in self.openers:
            await self.out.startable_below(self.rows_ahead)
            try:
                shard = await self.write.open(opener)
            except FinishedMeanwhile:
                continue
            except (LlavaError, OSError) as error:
                self.error = error
                break
            await self._hand_out(shard)
            if not shard.pending:
                await self.write.write(shard)
        self.out.close()

    async def _hand_out(self, shard: OpenShard) -> None:
        self.deduplicator.add_open(shard)
        for row in shard.pending:
            ref, host = RowRef(shard, row), shard.host(row)
            known = shard.outcomes.get(row)
            if known is None and shard.captions[row] is None:
                known = Outcome(Status.BAD_CAPTION)
            if known is not None:
                record = RowRecord(row, known.status, reason=known.reason)
                await self.write.inbox.put(RowJob(shard, record))
            elif (old := shard.kept.get(row)) and old.check(row):
                record = RowRecord(row, Status.PENDING, attempts=int(old.attempts[row]))
                record.mtime = int(old.mtime[row])
                await self.write.inbox.put(RowJob(shard, record, duplicate_of=StoredRow(old, row)))
            elif host is not None and (found := self.deduplicator.claim(shard.urls[row], ref)):
                await self.write.inbox.put(RowJob(shard, RowRecord(row, Status.PENDING), duplicate_of=found))
            else:
                self.out.put(host, ref)
