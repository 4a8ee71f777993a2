"""Whatever is written into a shard is what any reader finds in it, wherever the writing was cut off."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import h5py
import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_core.row_status import Status
from llava_core.shards.byte_offsets import THUMBNAIL_BYTES
from llava_core.shards.dialogue import turns_to_text
from llava_core.shards.journal import HEADER_BYTES, RECORD
from llava_core.shards.part_file import is_finished, journal_of
from llava_core.shards.quantize import STORAGES, Storage, dequantise, quantise
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.shards import TOKENS, WIDTH, features_of, header

rows = st.builds(
    lambda *columns: columns,
    st.text(max_size=20),
    st.sampled_from([s for s in Status if s is not Status.PENDING]),
    st.integers(0, 599),
    st.integers(0, 9),
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    st.binary(min_size=32, max_size=32),
    st.none() | st.binary(max_size=THUMBNAIL_BYTES - 2).map(lambda jpeg: jpeg + b"\xff\xd9"),
)


def records_of(table: list[tuple]) -> list[RowRecord]:  # type: ignore[type-arg]
    return [
        RowRecord(i, status, features_of(i) if status is Status.OK else None, *columns)
        for i, (_, status, *columns) in enumerate(table)
    ]


def stored(storage: Storage, features: np.ndarray) -> np.ndarray:
    """What is left of the features."""
    if storage == "float16":
        return features
    out = np.empty_like(features)
    dequantise(*quantise(features), out)
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(rows, max_size=9),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(STORAGES),
)
def test_round_trip(table: list[tuple], random, batch: int, thumbnails: bool, storage: Storage) -> None:  # type: ignore[no-untyped-def,type-arg]
    records = records_of(table)
    shuffled = random.sample(records, len(records))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        made = header([caption for caption, *_ in table])
        made = dataclasses.replace(made, storage=storage, thumbnails=thumbnails)
        with ShardWriter(path, made) as writer:
            for start in range(0, len(shuffled), batch):
                writer.write(shuffled[start : start + batch])
            writer.finish()
        assert is_finished(path)
        assert [p.name for p in Path(folder).iterdir()] == ["x.h5"]
        shard = Shard(path)
        assert (shard.rows, shard.tokens, shard.width) == (len(table), TOKENS, WIDTH)
        assert (shard.identity, shard.source) == (made.identity, made.source)
        for record, (caption, *_) in zip(records, table, strict=True):
            i = record.row
            assert shard.caption(i) == caption.encode("utf-8", "replace").decode()
            assert (shard.url(i), shard.id(i)) == (made.urls[i], made.ids[i])
            assert shard.status[i] == record.status
            assert (shard.http[i], shard.attempts[i], shard.nbytes[i]) == (
                record.http,
                record.attempts,
                record.nbytes,
            )
            assert tuple(shard.orig_hw[i]) == record.orig_hw
            assert shard.sha256[i].tobytes() == record.sha256
            kept = thumbnails and record.status is Status.OK
            assert shard.thumbnail(i) == (record.thumbnail if kept else None)
            if record.features is not None:
                assert np.array_equal(shard.read(i), stored(storage, record.features))
                assert shard.check(i)
        with h5py.File(path) as plain:  # any HDF5 reader finds the same
            assert plain.attrs["storage"] == storage
            for record in records:
                if record.features is not None:
                    found = plain["features"][record.row]
                    scales = plain["scales"][record.row] if storage == "int8" else np.empty(0)
                    digest = xxhash.xxh3_64_intdigest(found.tobytes() + scales.tobytes())
                    assert plain["xxh3"][record.row] == digest
                    read = found * scales if storage == "int8" else found
                    assert np.array_equal(read, stored(storage, record.features))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.data())
def test_a_journal_cut_anywhere_loses_only_what_was_cut(total: int, wanted: int, data: st.DataObject) -> None:
    written = min(wanted, total)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.h5"
        made = header([f"row {i}" for i in range(total)])
        records = [RowRecord(i, Status.OK, features_of(i)) for i in range(total)]
        with ShardWriter(path, made) as writer:
            writer.write(records[:written])
        size = journal_of(path).stat().st_size
        cut = data.draw(st.integers(0, size))
        with journal_of(path).open("r+b") as journal:
            journal.truncate(cut)
            if data.draw(st.booleans()):  # garbage where a block was allocated and never written
                journal.seek(cut)
                journal.write(data.draw(st.binary(max_size=200)))
        whole = max(0, cut - HEADER_BYTES) // RECORD.itemsize
        with ShardWriter(path, made) as writer:
            assert writer.done.tolist() == [i < whole for i in range(total)]
            writer.write([record for record in records if not writer.done[record.row]])
            writer.finish()
        shard = Shard(path)
        assert all(np.array_equal(shard.read(i), features_of(i)) and shard.check(i) for i in range(total))


turns = st.lists(st.tuples(st.none() | st.text(max_size=9), st.text(max_size=9)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(turns, min_size=1, max_size=5))
def test_dialogues_come_back_as_they_were(dialogues: list[list[tuple[str | None, str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        texts = [turns_to_text(dialogue) for dialogue in dialogues]
        made = dataclasses.replace(header(texts), conversations=True)
        with ShardWriter(Path(folder) / "x.h5", made) as writer:
            writer.write([RowRecord(i, Status.OK, features_of(i)) for i in range(len(texts))])
            writer.finish()
        shard = Shard(Path(folder) / "x.h5")
        assert [list(shard.turns(row)) for row in range(shard.rows)] == dialogues
