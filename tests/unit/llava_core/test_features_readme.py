"""The format's document says what the code does."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

from llava_core.row_status import Status
from llava_core.shards.byte_offsets import COLUMNS
from llava_core.shards.hdf5_file import TEXTS
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from tests.support.paths import ROOT
from tests.support.shards import CAPTIONS, header, outcome, write_shard

DOCUMENT = (ROOT / "features/README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = Shard(write_shard(tmp_path / "features/train/train-00000.h5", failed=[0]))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(example, {})
    assert str(shard.read(1)) in out.getvalue()
    assert shard.caption(1) in out.getvalue()
    assert shard.identity.fingerprint in out.getvalue()


def test_every_status_and_dataset_is_listed() -> None:
    codes = dict(re.findall(r"\| (\d+) \| ([a-z0-9 ]+) (?=\|)", DOCUMENT))
    assert {int(code): label for code, label in codes.items()} == {int(s): s.label for s in Status}
    for name in (
        *COLUMNS,
        "features",
        "scales",
        "thumbnails",
        "mtime",
        *(f"{text}_{part}" for text in TEXTS for part in ("bytes", "offsets")),
    ):
        assert f"`{name}`" in DOCUMENT
    for name, (kind, _) in COLUMNS.items():
        assert np.dtype(kind).str.replace("|", "") in DOCUMENT, name


@pytest.mark.parametrize("local", [False, True])
def test_the_columns_checksum_is_over_the_columns_that_it_lists(tmp_path: Path, local: bool) -> None:
    path = tmp_path / "a.h5"
    with ShardWriter(path, dataclasses.replace(header(CAPTIONS), local=local)) as writer:
        writer.write([dataclasses.replace(outcome(row), mtime=row + 1) for row in range(len(CAPTIONS))])
        writer.finish()
    (listed,) = re.findall(r"\| the columns (.*), end to end", DOCUMENT)
    with h5py.File(path) as file:
        held = [file[name][:].tobytes() for name in re.findall("`([a-z0-9_]+)`", listed) if name in file]
    recorded = np.frombuffer(path.read_bytes()[:4096], "<u8")[2]
    assert xxhash.xxh3_64_intdigest(b"".join(held)) == recorded
