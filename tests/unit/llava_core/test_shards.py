from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

from llava_core.errors import LlavaError
from llava_core.row_status import Failure, Status
from llava_core.shards import reader
from llava_core.shards.byte_offsets import FORMAT_VERSION
from llava_core.shards.folder import open_shards
from llava_core.shards.journal import HEADER_BYTES, RECORD
from llava_core.shards.part_file import FinishedMeanwhile, is_finished, journal_of, part_of
from llava_core.shards.quantize import STORAGES, Storage
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.paths import ROOT
from tests.support.shards import TOKENS, WIDTH, features_of, header, outcome, reseal, write_shard


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
from llava_core.shards.writer import ShardWriter
from tests.support.shards import header, outcome

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
        ended = subprocess.run([sys.executable, "-c", KILLED, path, "20", "6"], cwd=ROOT)
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


def test_reasons_survive_a_crash_and_a_retry(tmp_path: Path) -> None:
    path, reasons = tmp_path / "a.h5", ["", "HTTP 403", "", "图" * 40]
    records = [
        dataclasses.replace(outcome(row), reason=reason) for row, reason in enumerate(reasons) if not reason
    ] + [RowRecord(row, Status.HTTP_4XX, reason=reason) for row, reason in enumerate(reasons) if reason]
    with ShardWriter(path, header("abcd")) as writer:
        writer.write(records[:3])
    with ShardWriter(path, header("abcd")) as writer:  # reads the journal
        assert writer.outcome(1).reason == "HTTP 403"
        writer.write(records[3:])
        writer.finish()
    kept = ["", "HTTP 403", "", "图" * 20 + "…"]  # whole characters in 64 bytes
    assert [Shard(path).reason_of(row) for row in range(4)] == kept
    with ShardWriter(path, retry=np.arange(4) == 3) as writer:
        writer.write([outcome(3)])
        writer.finish()
    assert [Shard(path).reason_of(row) for row in range(4)] == [*kept[:3], ""]


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
    with pytest.raises(
        LlavaError, match=r"another encoder; expected random .*; got random .*: size: 32 vs 64"
    ):
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
    reseal(path)
    assert np.array_equal(Shard(path).read(0), features_of(0))
    for storage, complaint in (
        ("int8", r"expected int8 \(12, 5, 12\)"),
        ("int4", "expected float16, int8"),
    ):
        with h5py.File(path, "r+") as file:
            file.attrs["storage"] = storage
        reseal(path)
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
    reseal(newer)
    with pytest.raises(LlavaError, match=f"got llava-features version {FORMAT_VERSION + 1}"):
        Shard(newer)


def test_attributes_must_agree_with_the_fingerprint(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        encoder = json.loads(file.attrs["encoder"])
        file.attrs["encoder"] = json.dumps({**encoder, "layer": -2})
    reseal(path)
    with pytest.raises(LlavaError, match="fingerprint"):
        Shard(path)


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        del file["caption_offsets"]
    reseal(path)
    with pytest.raises(LlavaError, match="caption_offsets"):
        Shard(path)


def test_shards_of_two_encoders_are_named_with_the_key(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.h5")
    write_shard(tmp_path / "b.h5", size=64)
    with pytest.raises(LlavaError, match=r"a\.h5 and .*b\.h5 .*got random .*: size: 32 vs 64"):
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
        "from pathlib import Path; from llava_core.shards.folder import open_shards;"
        "shards = open_shards(Path(sys.argv[1]));"
        "print(sum(len(shard.read(0)) for _ in range(2) for shard in shards))"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == f"{2 * 40 * TOKENS}\n", ended.stderr


def test_threads_share_open_files_while_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads what it asked for, and no file stays open once the shards are gone."""
    monkeypatch.setattr(reader, "_kept", collections.deque[reader.OpenFile](maxlen=2))
    before = len(os.listdir("/proc/self/fd"))
    shards = [Shard(write_shard(tmp_path / f"{k}.h5", seed=k)) for k in range(5)]
    together = threading.Barrier(8)

    def read(seed: int) -> bool:
        order = np.random.default_rng(seed).integers([[5, 12]] * 300)
        together.wait()
        return all(np.array_equal(shards[k].read(row), features_of(row, k)) for k, row in order.tolist())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    shards.clear()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_was_replaced_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_kept", collections.deque[reader.OpenFile](maxlen=1))
    shard, other = (Shard(write_shard(tmp_path / f"{name}.h5")) for name in "xy")
    assert np.array_equal(shard.read(3), features_of(3))
    os.replace(write_shard(tmp_path / "new.h5", seed=1), shard.path)
    other.read(0)
    with pytest.raises(LlavaError, match=r"row 3 of .*x\.h5 is damaged"):
        shard.read(3)


def test_any_flipped_bit_outside_of_features_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5")
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for position in rng.integers(0, Shard(path).layout.offsets["features"], 400).tolist():
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(LlavaError):
            Shard(path)


def test_a_shard_from_before_there_were_dialogues_holds_captions(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.h5", rows=2)
    with h5py.File(path, "r+") as file:
        del file.attrs["text"], file.attrs["images"]
    reseal(path)
    shard = Shard(path)
    assert (shard.conversations, shard.local) == (False, False)
    assert shard.turns(1) == ((None, shard.caption(1)),)
    with h5py.File(path, "r+") as file:
        file.attrs["text"] = "poem"
    reseal(path)
    with pytest.raises(LlavaError, match=r"damaged shard .* text poem"):
        Shard(path)


FAULTS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/types.h>

int until = 0, kind = 0;  /* writes until one goes wrong; 0 fails, 1 writes half, 2 writes something else */

static ssize_t faulty(const char *name, int file, const void *data, size_t size, off_t offset) {
    ssize_t (*whole)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, name);
    if (until == 0 || --until) return whole(file, data, size, offset);
    if (kind == 0) { errno = EIO; return -1; }
    if (kind == 1) return whole(file, data, (size + 1) / 2, offset);
    char other[size];
    memset(other, 0, size);
    return whole(file, other, size, offset);
}

ssize_t pwrite(int f, const void *d, size_t n, off_t o) { return faulty("pwrite", f, d, n, o); }
ssize_t pwrite64(int f, const void *d, size_t n, off_t o) { return faulty("pwrite64", f, d, n, o); }
"""

CREATE = """
import ctypes, sys
from pathlib import Path
from llava_core.shards.reader import Shard
from tests.support.shards import CAPTIONS, write_shard

faults, failed = ctypes.CDLL(sys.argv[1]), 0
until, kind = (ctypes.c_int.in_dll(faults, name) for name in ("until", "kind"))
for kind.value in range(3):
    for number in range(1, 200):
        path, until.value = Path(sys.argv[2]) / f"{kind.value}-{number}.h5", number
        try:
            write_shard(path, rows=4)
        except OSError:
            failed += 1
            assert not path.exists()
            continue
        if until.value:  # there were no more writes
            break
        shard = Shard(path)
        texts = [shard.caption(row) for row in range(4)]
        assert texts == [f"{text}{row}" for row, text in enumerate(CAPTIONS)], (kind.value, number, texts)
        assert shard.urls() == [f"http://example.org/{row}.jpg" for row in range(4)]
        assert all(shard.check(row) for row in range(4))
    until.value = 0
print(failed)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="builds a library that makes writes fail")
def test_no_failed_write_is_swallowed(tmp_path: Path) -> None:
    """HDF5 goes on after a pwrite that failed: captions of NULs. Each write of a shard's life fails once."""
    (tmp_path / "faults.c").write_text(FAULTS)
    library = tmp_path / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "faults.c", "-ldl"], check=True)
    ended = subprocess.run(
        [sys.executable, "-c", CREATE, library, tmp_path],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 40


def test_a_write_that_does_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"])) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OSError, match="does nothing"):
            writer.write([outcome(0)])


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_damaged_row_of_a_part_is_made_again_and_said(
    tmp_path: Path, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = tmp_path / "x.h5", header(["a"] * 9)
    made = dataclasses.replace(made, thumbnails=True, storage=storage)
    with ShardWriter(path, made) as writer:
        writer.write([dataclasses.replace(outcome(row), thumbnail=b"jpeg") for row in range(8)])
        layout = writer.layout
    flip(part_of(path), layout.offsets["features"] + 3 * TOKENS * WIDTH * (2 if storage == "float16" else 1))
    flip(part_of(path), layout.offsets["thumbnails"] + 5 * 4096 + 2)
    with ShardWriter(path, made) as writer:
        assert np.flatnonzero(~writer.done).tolist() == [3, 5, 8]
        writer.write([outcome(row) for row in (3, 5, 8)])
        writer.finish()
    assert f"2 rows of {part_of(path)} damaged, to be made again: 3, 5" in capsys.readouterr().err
    assert all(Shard(path).check(row) for row in range(9))
    flip(path, layout.offsets["features"])
    with ShardWriter(path, retry=[Failure(Status.DAMAGED)]) as writer:
        assert np.flatnonzero(~writer.done).tolist() == [0]


def test_a_part_with_other_texts_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 9)) as writer:
        place = writer.layout.offsets["caption_bytes"]
    flip(part_of(tmp_path / "x.h5"), place + 2)
    with pytest.raises(LlavaError, match=r"damaged shard .*x\.h5\.part; got other texts"):
        ShardWriter(tmp_path / "x.h5", header(["a"] * 9))


def test_a_journal_of_another_shard_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 9)) as writer:
        writer.write([outcome(0)])
    flip(journal_of(tmp_path / "x.h5"), 12)
    with ShardWriter(tmp_path / "x.h5", header(["a"] * 9)) as writer:
        assert not writer.done.any()
    assert "x.h5.journal is damaged, or of another shard: its rows are made again" in capsys.readouterr().err


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_is_checked_when_a_process_first_reads_it(tmp_path: Path, storage: Storage) -> None:
    path = write_shard(tmp_path / "x.h5", storage=storage)
    shard = Shard(path)
    before = shard.read(2)
    flip(
        path,
        shard.layout.offsets["features"] + 2 * shard.layout.parts["features"][0].itemsize * TOKENS * WIDTH,
    )
    assert not np.array_equal(shard.read(2), before)  # it has been checked
    for opened in (Shard(path), pickle.loads(pickle.dumps(shard))):
        assert np.array_equal(opened.read(1), shard.read(1))
        with pytest.raises(
            LlavaError, match=r"row 2 of .*x\.h5 is damaged; `extract verify .* `extract retry-"
        ):
            opened.read(2)


def test_thumbnails_that_change_places_are_noticed(tmp_path: Path) -> None:
    made = dataclasses.replace(header(["a"] * 2), thumbnails=True)
    with ShardWriter(tmp_path / "x.h5", made) as writer:
        writer.write([dataclasses.replace(outcome(row), thumbnail=b"jpeg %d" % row) for row in range(2)])
        writer.finish()
    data = bytearray((tmp_path / "x.h5").read_bytes())
    start = Shard(tmp_path / "x.h5").layout.offsets["thumbnails"]
    slots = slice(start, start + 2 * 4096)
    data[slots] = data[slots][4096:] + data[slots][:4096]
    (tmp_path / "x.h5").write_bytes(data)
    with pytest.raises(LlavaError, match=r"the thumbnail of row 1 of .* is damaged"):
        Shard(tmp_path / "x.h5").thumbnail(1)
    assert not Shard(tmp_path / "x.h5").check(0)
