"""Which rows have words, in one read of all, as row by row; and their identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from llava_core.errors import LlavaError
from llava_core.row_status import Status
from llava_core.shards.dialogue import turns_to_text
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.shards import header, outcome
from train.data import sources
from train.data.sources import rows_identity, usable_rows

SPACES = ["", " ", "\t\n\x0b\x0c\r", "\x1c\x1d\x1e\x1f", "\x85", "\xa0", "\u1680", "\u2000\u200a", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000"]  # fmt: skip
CAPTIONS = [*SPACES, *(f"{space}图{space}" for space in SPACES), "a", "\x00", "“引号”", "《书》", "ⴰ"]
CAPTIONS += ["é🙂", "\u200b"]


def write(path: Path, captions: list[str], conversations: bool = False) -> Shard:
    """Every fifth row has failed; every seventh is about no picture."""
    path.parent.mkdir(exist_ok=True)
    with ShardWriter(path, dataclasses.replace(header(captions), conversations=conversations)) as writer:
        for row in range(len(captions)):
            failed = Status.TEXT_ONLY if row % 7 == 3 else Status.TIMEOUT if row % 5 == 3 else None
            writer.write([outcome(row) if failed is None else RowRecord(row, failed)])
        writer.finish()
    return Shard(path)


def test_captions_of_spaces_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [write(tmp_path / "f/a.h5", CAPTIONS), write(tmp_path / "f/b.h5", CAPTIONS[::-1])]
    worded, told = shards[0].worded(2, 30)
    assert worded.tolist() == [bool(text.strip()) for text in CAPTIONS[2:30]]
    assert not told.any()
    characters = shards[0].caption_characters(0, len(CAPTIONS))
    assert characters.tolist() == [len(text) if text.strip() else 0 for text in CAPTIONS]
    for text, at_once in ((False, 4), (True, 1000)):
        monkeypatch.setattr(sources, "AT_ONCE", at_once)
        wanted = [
            (s, row)
            for s, shard in enumerate(shards)
            for row in range(shard.rows)
            if shard.status[row] in ((Status.OK, Status.TEXT_ONLY) if text else (Status.OK,))
            if shard.caption(row).strip()
        ]
        for limit in (0, 1, 7, len(wanted) - 1, 10_000):
            rows, system = usable_rows(shards, limit, text)
            assert [tuple(place) for place in rows.tolist()] == wanted[:limit]
            assert not system


def test_system_messages_are_seen_in_the_rows_that_are_taken(tmp_path: Path) -> None:
    texts = [turns_to_text([("q", "a")], "短" if row == 4 else None) for row in range(6)]
    shard = write(tmp_path / "f/a.h5", texts, conversations=True)
    assert [usable_rows([shard], limit)[1] for limit in (2, 3, 4)] == [False, False, True]  # 3 has failed
    caption = write(tmp_path / "f/b.h5", texts)
    assert not usable_rows([caption], 10)[1]


def test_damaged_words_are_refused_at_once(tmp_path: Path) -> None:
    shard = write(tmp_path / "f/a.h5", ["图", "形"])
    data = shard.path.read_bytes()
    at = shard.layout.offsets["caption_bytes"] + 4
    shard.path.write_bytes(data[:at] + b"a" + data[at + 1 :])
    with pytest.raises(LlavaError, match=r"damaged shard .*a.h5; got caption of row 1"):
        shard.worded(0, 2)


def test_identity_is_that_of_the_json_text(tmp_path: Path) -> None:
    """Which runs of earlier versions keep in their checkpoints."""
    shards = [write(tmp_path / "f/a.h5", CAPTIONS), write(tmp_path / "f/b.h5", CAPTIONS)]
    used = [(shard.path.name, shard.layout.uid) for shard in shards]
    rows = np.array([[0, 1], [0, 12], [1, 0], [1, 5]], np.int32)
    for some in (rows, rows[:1], rows[2:], rows[:0]):
        for sizes in ([len(some)], [1, 3]):
            content = [used, some.tolist(), *([sizes] if len(sizes) > 1 else [])]
            whole = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            assert rows_identity(shards, some, sizes) == whole
