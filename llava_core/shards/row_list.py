"""Row lists: a parquet file of rows of a cache, with the reason why one is not worth training on.

`extract curate` writes one, `train run --rows` reads it. Columns: `shard` (a file's name), `uid` (that
file's, which ties the list to the cache), `row`, and `reason`, which is empty for a row that is kept. Others
are not read, so a list may be edited by any tool that writes parquet.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava_core.errors import LlavaError, first_line
from llava_core.filesystem import replacing, require_file
from llava_core.row_status import Status
from llava_core.shards.reader import Shard

COLUMNS = ("shard", "uid", "row")
"""Columns that a list must have; without `reason` all its rows are kept."""
AGAIN = "make a list of this cache with `extract curate`"


@dataclasses.dataclass(frozen=True)
class RowList:
    """The rows that a list keeps."""

    path: Path
    sha256: str
    """Over the rows that are kept, in hex. Scores may differ in their last digits from time to time."""
    kept: Mapping[str, np.ndarray]
    """Rows that are kept, ascending, by the uid of their shard."""
    shards: Mapping[str, str]
    """Name of each shard that is listed, by its uid, also where it keeps no row."""

    def rows_of(self, shard: Shard) -> np.ndarray:
        """Rows of a shard that are kept, ascending, int64."""
        found = [self.kept[uid] for uid in shard.uids if uid in self.kept]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))

    def require_of(self, shards: Sequence[Shard]) -> None:
        """Raise LlavaError unless the list is of these shards, and its rows have features, or no picture."""
        uids = {uid for shard in shards for uid in shard.uids}
        if foreign := sorted(name for uid, name in self.shards.items() if uid not in uids):
            names = {shard.path.name for shard in shards}
            what = f"another {foreign[0]}" if foreign[0] in names else f"{foreign[0]}, which is not there"
            folders = dict.fromkeys(str(shard.path.parent) for shard in shards)
            raise LlavaError(
                f"{self.path} is not of the cache {', '.join(folders)}", got=f"rows of {what}", do=AGAIN
            )
        for shard in shards:
            rows = self.rows_of(shard)
            if len(rows) and not 0 <= rows[0] <= rows[-1] < shard.rows:
                got = rows[0] if rows[0] < 0 else rows[-1]
                expected = f"0 to {shard.rows - 1}"
                raise LlavaError(
                    f"a row of {shard.path.name} in {self.path}", expected=expected, got=got, do=AGAIN
                )
            failed = rows[~np.isin(shard.status[rows], [Status.OK, Status.TEXT_ONLY])]
            if len(failed):
                raise LlavaError(
                    f"{self.path} keeps row {failed[0]} of {shard.path.name}, which has no features",
                    got=Status(int(shard.status[failed[0]])).label,
                    do=AGAIN,
                )


def read_row_list(path: Path) -> RowList:
    """Read a list strictly. Raises LlavaError if it is no list, is damaged, keeps no row, or lists a row both
    as kept and with a reason."""
    shards, uids, rows, reasons = _columns_of(path)
    kept = np.array([not (reason or "").strip() for reason in reasons], bool)
    if not kept.any():
        raise LlavaError(f"{path} keeps no row", got=f"{len(rows)} rows with a reason", do=AGAIN)
    names, of_uid = dict(zip(uids, shards, strict=True)), np.array(uids, object)
    by_uid = {}
    for uid, shard in names.items():
        own = of_uid == uid
        by_uid[uid] = np.unique(rows[own & kept])
        if len(both := np.intersect1d(by_uid[uid], rows[own & ~kept])):
            what = f"{path} lists row {both[0]} of {shard} twice, as kept and with a reason"
            raise LlavaError(what, do="leave one of the two lines")
    digest = hashlib.sha256()
    for uid in sorted(by_uid):
        digest.update(uid.encode() + by_uid[uid].astype("<i8").tobytes())
    return RowList(path, digest.hexdigest(), by_uid, names)


def _columns_of(path: Path) -> tuple[list[str], list[str], np.ndarray, list[str | None]]:
    """Shard, uid, row and reason of each line. Raises LlavaError if one is missing, or of another type."""
    require_file("--rows", path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        names = set(table.column_names)
        if missing := [name for name in COLUMNS if name not in names]:
            expected = f"columns {', '.join(COLUMNS)}"
            raise LlavaError(f"{path} is no row list", expected=expected, got=f"no {missing[0]}", do=AGAIN)
        shards, uids = (table[name].cast(pa.string()).to_pylist() for name in ("shard", "uid"))
        rows = table["row"].cast(pa.int64())
        reason = table["reason"] if "reason" in names else pa.nulls(len(rows), pa.string())
        if empty := next((name for name in COLUMNS if table[name].null_count), None):
            raise LlavaError(f"{path} is no row list", got=f"a line without a {empty}", do=AGAIN)
        if reason.null_count < len(rows) and pa.types.is_primitive(reason.type):
            expected = "reason as text, empty for a row that is kept"
            raise LlavaError(f"{path} is no row list", expected=expected, got=reason.type, do=AGAIN)
        return shards, uids, rows.to_numpy(), reason.cast(pa.string()).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LlavaError(f"{path} is no row list", got=first_line(error), do=AGAIN) from None


def require_own(path: Path) -> None:
    """Raise LlavaError (wrong usage) if the file to be written is there, and is no row list."""
    try:
        if not path.exists() or set(COLUMNS) <= set(pq.read_schema(path).names):
            return
    except (pa.ArrowException, OSError, ValueError):
        pass
    expected, got = "a new file, or a row list to replace", f"{path}, which is something else"
    raise LlavaError("--out", expected=expected, got=got, exit_code=2)


def write_row_list(
    path: Path, shards: Sequence[Shard], places: np.ndarray, columns: Mapping[str, Any]
) -> None:
    """Write or replace a list atomically: (shard, row) of each row, int [rows, 2], and other columns."""
    names, uids = [name_of(shard) for shard in shards], [shard.layout.uid for shard in shards]
    numbers = pa.array(places[:, 0], pa.int32())
    table = pa.table(
        {
            "shard": pa.DictionaryArray.from_arrays(numbers, pa.array(names)),
            "uid": pa.DictionaryArray.from_arrays(numbers, pa.array(uids)),
            "row": pa.array(places[:, 1], pa.int64()),
            **columns,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def name_of(shard: Shard) -> str:
    """Name of a shard's file as text, for readers: "?" for a byte that is none in UTF-8."""
    return shard.path.name.encode(errors="replace").decode()
