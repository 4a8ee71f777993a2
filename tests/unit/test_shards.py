from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from llava_core.errors import LlavaError
from llava_core.features import open_shards
from llava_core.journal import HEADER_BYTES, RECORD
from llava_core.shard_writer import (
    FinishedMeanwhile,
    RowRecord,
    ShardWriter,
    is_finished,
    journal_of,
    part_of,
)
from llava_core.shards import FORMAT_VERSION, Shard
from llava_core.status import Failure, Status
from llava_core.storage import STORAGES, Storage
from tests.small_shards import TOKENS, WIDTH, features_of, header, outcome, write_shard


def test_features_are_contiguous_aligned_and_sparse_until_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 5000)) as writer:
        assert writer.layout.offsets["features"] % 4096 == 0
        size, used = part_of(writer.path).stat().st_size, part_of(writer.path).stat().st_blocks * 512
        assert size > writer.layout.offsets["features"] + 4999 * TOKENS * WIDTH * 2
        assert used < size / 2
    with h5py.File(part_of(tmp_path / "x.h5")) as file:
        plist = file["features"].id.get_create_plist()
        assert plist.get_layout() == h5py.h5d.CONTIGUOUS
        assert plist.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
        assert plist.get_fill_time() == h5py.h5d.FILL_TIME_NEVER


def test_thumbnails_are_kept_where_there_is_space_for_them(tmp_path: Path) -> None:
    made = dataclasses.replace(header(["a"] * 4), thumbnails=True)
    with ShardWriter(tmp_path / "x.h5", made) as writer:
        writer.write([dataclasses.replace(outcome(0), thumbnail=b"\xff\xd8 a \xff\xd9"), outcome(1)])
        writer.write([RowRecord(row, Status.HTTP_4XX, thumbnail=b"no picture") for row in (2, 3)])
        writer.finish()
    shard = Shard(tmp_path / "x.h5")
    assert shard.layout.offsets["thumbnails"] % 4096 == 0
    assert [shard.thumbnail(row) for row in range(4)] == [b"\xff\xd8 a \xff\xd9", None, None, None]
    with h5py.File(shard.path) as file:
        assert (file["thumbnails"].shape, file["thumbnails"].dtype) == ((4, 4096), np.uint8)
        assert file["thumbnails"].id.get_create_plist().get_fill_time() == h5py.h5d.FILL_TIME_NEVER

    with ShardWriter(shard.path, retry=[Failure(Status.HTTP_4XX)]) as writer:
        writer.write([dataclasses.replace(outcome(2), thumbnail=b"late"), RowRecord(3, Status.TIMEOUT)])
        writer.finish()
    shard = Shard(shard.path)
    assert [shard.thumbnail(row) for row in range(4)] == [b"\xff\xd8 a \xff\xd9", None, b"late", None]

    path = write_shard(tmp_path / "y.h5", failed=[0])
    with ShardWriter(path, retry=[Failure(Status.HTTP_4XX)]) as writer:
        writer.write([dataclasses.replace(outcome(0), thumbnail=b"no space for it")])
        writer.finish()
    assert Shard(path).thumbnail(0) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from llava_core.shard_writer import ShardWriter
from tests.small_shards import header, outcome

path, rows, kill_after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with ShardWriter(path, header([f"row {i}" for i in range(rows)])) as writer:
    for row in range(rows):
        if writer.done[row]:
            continue
        writer.write([outcome(row)])
        kill_after -= 1
        if kill_after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    writer.finish()
"""


def test_killed_again_and_again_it_ends_with_every_row(tmp_path: Path) -> None:
    path, kills = tmp_path / "x.h5", 0
    while not is_finished(path):
        ended = subprocess.run([sys.executable, "-c", KILLED, path, "20", "6"], cwd=Path(__file__).parents[2])
        assert ended.returncode in (0, -signal.SIGKILL)
        kills += ended.returncode != 0
    assert kills == 3
    shard = Shard(path)
    assert all(shard.check(i) and np.array_equal(shard.read(i), features_of(i)) for i in range(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.h5"]


def test_killed_between_rename_and_clean_up(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    journal_of(path).write_bytes(b"of an earlier life")
    assert is_finished(path)
    with ShardWriter(tmp_path / "y.h5", header(["a"])) as writer:
        journal_of(path).replace(journal_of(writer.path))
    with ShardWriter(tmp_path / "y.h5", header(["a"])) as writer:
        assert not writer.done.any()  # a journal of another shard says nothing of this one


def test_a_second_writer_is_told_who_holds_the_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"])):
        with pytest.raises(LlavaError, match=f"is being written; got by process {os.getpid()} on "):
            ShardWriter(tmp_path / "x.h5", header(["a"]))
    with ShardWriter(tmp_path / "x.h5", header(["a"])):
        pass


def test_a_part_is_not_continued_with_another_encoder_or_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with ShardWriter(path, header(["a", "b"])):
        pass
    with pytest.raises(LlavaError, match=r"another encoder; got size: 32 vs 64"):
        ShardWriter(path, header(["a", "b"], size=64))
    with pytest.raises(LlavaError, match="another file"):
        ShardWriter(path, header(["a", "b", "c"]))


def test_a_part_goes_on_as_it_was_stored(tmp_path: Path) -> None:
    path, made = tmp_path / "x.h5", header(["a", "b"])
    with ShardWriter(path, dataclasses.replace(made, storage="int8")) as writer:
        writer.write([outcome(0)])
    with pytest.raises(LlavaError, match=r"x\.h5\.part holds features as int8; expected --dtype float16"):
        ShardWriter(path, made)
    with ShardWriter(path, dataclasses.replace(made, storage="int8")) as writer:
        assert writer.done.tolist() == [True, False]
        writer.write([RowRecord(1, Status.HTTP_4XX)])
        writer.finish()
    with ShardWriter(path, retry=[Failure(Status.HTTP_4XX)]) as writer:
        writer.write([outcome(1)])
        writer.finish()
    shard = Shard(path)
    assert shard.layout.storage == "int8"
    for row in range(2):
        error = np.linalg.norm(shard.read(row).astype(float) - features_of(row))
        assert 0 < error < 0.01 * np.linalg.norm(features_of(row).astype(float))
        assert shard.check(row)


def test_any_hdf5_reader_gets_the_features_of_int8(tmp_path: Path) -> None:
    """As features/README.md says: the product of two datasets."""
    path = write_shard(tmp_path / "x.h5", storage="int8")
    with h5py.File(path) as shard:
        features = shard["features"][3] * shard["scales"][3]
    assert features.dtype == np.float16
    assert np.array_equal(features, Shard(path).read(3))


def test_damage_to_a_scale_is_seen_by_the_checksum(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5", storage="int8")
    with path.open("r+b") as file:
        file.seek(Shard(path).layout.offsets["scales"] + WIDTH * 2 * 4 + 7)
        file.write(b"\xff")
    assert [Shard(path).check(i) for i in range(6)] == [True, True, True, True, False, True]


def test_shards_of_both_kinds_lie_side_by_side(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5")
    write_shard(tmp_path / "b.h5", storage="int8")
    full, small = open_shards(tmp_path)
    assert full.identity == small.identity
    assert full.read(3).dtype == small.read(3).dtype == np.float16
    assert np.allclose(full.read(3), small.read(3), atol=0.02)
    copy: Shard = pickle.loads(pickle.dumps(small))
    assert np.array_equal(copy.read(3), small.read(3))


def test_how_features_are_stored_is_read_strictly(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        del file.attrs["storage"]  # as shards had it before int8
    assert np.array_equal(Shard(path).read(0), features_of(0))
    for storage, complaint in (
        ("int8", r"expected int8 \(12, 5, 12\)"),
        ("int4", "expected float16 or int8"),
    ):
        with h5py.File(path, "r+") as file:
            file.attrs["storage"] = storage
        with pytest.raises(LlavaError, match=complaint):
            Shard(path)


def test_a_full_disk_is_refused_before_it_is_full(tmp_path: Path) -> None:
    huge = header(["a"])
    object.__setattr__(huge, "width", 10**15)
    with pytest.raises(LlavaError, match="not enough disk space"):
        ShardWriter(tmp_path / "x.h5", huge)
    assert list(tmp_path.iterdir()) == []


def test_retry_redoes_only_what_failed(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5", failed=[2, 5])
    before = path.read_bytes()
    with ShardWriter(path, retry=[Failure(Status.HTTP_4XX)]) as writer:
        assert np.flatnonzero(~writer.done).tolist() == [2, 5]
        writer.write([outcome(2)])
    assert path.read_bytes() == before  # work goes on in a copy
    assert not is_finished(path)
    with ShardWriter(path, retry=[Failure(Status.HTTP_4XX)]) as writer:  # interrupted, continued
        assert np.flatnonzero(~writer.done).tolist() == [5]
        writer.write([RowRecord(5, Status.TIMEOUT)])
        writer.finish()
    shard = Shard(path)
    assert shard.status[2] == Status.OK
    assert shard.status[5] == Status.TIMEOUT
    assert all(np.array_equal(shard.read(i), features_of(i)) for i in range(12) if i != 5)


def test_shards_travel_to_other_processes(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "x.h5"))
    shard.read(0)
    copy: Shard = pickle.loads(pickle.dumps(shard))
    assert np.array_equal(copy.read(3), shard.read(3))
    assert copy.caption(3) == shard.caption(3)


def test_damage_is_seen_by_the_checksum(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    offset = Shard(path).layout.offsets["features"]
    with path.open("r+b") as file:
        file.seek(offset + TOKENS * WIDTH * 2 * 4 + 7)
        file.write(b"\xff")
    shard = Shard(path)
    assert [shard.check(i) for i in range(6)] == [True, True, True, True, False, True]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_refused(tmp_path: Path, share: float) -> None:
    path = write_shard(tmp_path / "x.h5", rows=200)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(LlavaError, match=str(path)):
        Shard(path)


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.h5"
    text.write_text("no HDF5")
    with pytest.raises(LlavaError, match="not a readable HDF5 file"):
        Shard(text)
    with h5py.File(tmp_path / "b.h5", "w"):
        pass
    with pytest.raises(LlavaError, match="another format"):
        Shard(tmp_path / "b.h5")
    newer = write_shard(tmp_path / "c.h5")
    with h5py.File(newer, "r+") as file:
        file.attrs["format_version"] = FORMAT_VERSION + 1
    with pytest.raises(LlavaError, match=f"got llava-features version {FORMAT_VERSION + 1}"):
        Shard(newer)


def test_attributes_must_agree_with_the_fingerprint(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        encoder = json.loads(file.attrs["encoder"])
        file.attrs["encoder"] = json.dumps({**encoder, "layer": -2})
    with pytest.raises(LlavaError, match="fingerprint"):
        Shard(path)


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        del file["caption_offsets"]
    with pytest.raises(LlavaError, match="caption_offsets"):
        Shard(path)


def test_shards_of_two_encoders_are_named_with_the_key(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5")
    write_shard(tmp_path / "b.h5", size=64)
    with pytest.raises(LlavaError, match=r"a\.h5 and .*b\.h5 .*got size: 32 vs 64"):
        open_shards(tmp_path)


def test_folders_without_shards(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no feature folder"):
        open_shards(tmp_path / "nowhere")
    with pytest.raises(LlavaError, match="no finished shard"):
        open_shards(tmp_path)
    with ShardWriter(tmp_path / "x.h5", header(["a"])):
        pass
    with pytest.raises(LlavaError, match=r"1 unfinished, such as x\.h5\.part"):
        open_shards(tmp_path)
    write_shard(tmp_path / "train/y.h5")
    with pytest.raises(LlavaError, match=f"no shard .* in {tmp_path}; give one of {tmp_path}/train$"):
        open_shards(tmp_path)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(LlavaError, match="is no feature shard; expected a folder"):
        open_shards(tmp_path / "photo.jpg")


def test_a_flipped_bit_in_the_journal_costs_one_row(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 9)) as writer:
        for row in range(8):
            writer.write([outcome(row)])
    data = bytearray(journal_of(tmp_path / "x.h5").read_bytes())
    data[HEADER_BYTES + 3 * RECORD.itemsize + 5] ^= 1
    journal_of(tmp_path / "x.h5").write_bytes(data)
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 9)) as writer:
        assert np.flatnonzero(~writer.done).tolist() == [3, 8]
        writer.write([outcome(3), outcome(8)])
        writer.finish()
    shard = Shard(tmp_path / "x.h5")
    assert all(np.array_equal(shard.read(row), features_of(row)) for row in range(9))


def test_a_retry_never_begins_from_nothing(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5", failed=[2])
    with ShardWriter(path, retry=[Failure(Status.HTTP_4XX)]):
        pass
    journal_of(path).write_bytes(b"damaged")
    with pytest.raises(LlavaError, match=r"damaged journal .*x\.h5\.journal"):
        ShardWriter(path, retry=[Failure(Status.HTTP_4XX)])
    assert Shard(path).status.tolist().count(Status.OK) == 11


def test_a_shard_that_another_process_finished_is_left_alone(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    before = path.read_bytes()
    with pytest.raises(FinishedMeanwhile):
        ShardWriter(path, header(["a"] * 12))
    assert path.read_bytes() == before


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    for k in range(40):
        write_shard(tmp_path / f"{k}.h5", rows=1)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30));"
        "from pathlib import Path; from llava_core.features import open_shards;"
        "print(len(open_shards(Path(sys.argv[1]))))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert ended.stdout == "40\n", ended.stderr


def test_any_flipped_bit_is_read_or_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, Shard(path).layout.offsets["features"], 400).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with contextlib.suppress(LlavaError):
            shard = Shard(path)
            for row in range(shard.rows):
                shard.caption(row), shard.url(row), shard.id(row)


def test_a_shard_from_before_there_were_dialogues_holds_captions(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5", rows=2)
    with h5py.File(path, "r+") as file:
        del file.attrs["text"], file.attrs["images"]
    shard = Shard(path)
    assert (shard.conversations, shard.local) == (False, False)
    assert shard.turns(1) == ((None, shard.caption(1)),)
    with h5py.File(path, "r+") as file:
        file.attrs["text"] = "poem"
    with pytest.raises(LlavaError, match=r"damaged shard .* text poem"):
        Shard(path)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_first_token_alone_is_the_first_of_all(tmp_path: Path, storage: Storage) -> None:
    shard = Shard(write_shard(tmp_path / "part.h5", 4, storage=storage))
    for row in range(4):
        assert np.array_equal(shard.read_first(row), shard.read(row)[:1])
