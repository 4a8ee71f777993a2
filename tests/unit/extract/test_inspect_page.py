from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from extract.config import InspectConfig
from extract.inspect.command import run as inspect
from extract.inspect.page import choose, write_page
from extract.statistics import cache_statistics, spread
from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from tests.support.shards import TOKENS, WIDTH, header, outcome, write_shard


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """40 rows in two shards, 9 of them dead links."""
    write_shard(tmp_path / "out/a.h5", rows=20, failed=range(8))
    write_shard(tmp_path / "out/b.h5", rows=20, failed=[19])
    return open_shards(tmp_path / "out")


@pytest.mark.parametrize(
    ("sample", "failed", "ok"), [(0, 9, 31), (4, 1, 3), (20, 5, 15), (36, 9, 27), (38, 9, 29), (99, 9, 31)]
)
def test_up_to_a_quarter_of_the_rows_shown_are_failed_ones(
    shards: list[Shard], sample: int, failed: int, ok: int
) -> None:
    chosen = choose(shards, sample)
    counts = collections.Counter(int(shard.status[row]) for shard, row in chosen)
    assert (counts[Status.HTTP_4XX], counts[Status.OK]) == (failed, ok)
    places = [(shards.index(shard), row) for shard, row in chosen]
    assert places == sorted(set(places))
    assert {k for k, _ in places} == {0, 1}


def test_failed_rows_fill_the_page_where_few_are_ok(tmp_path: Path) -> None:
    shard = Shard(write_shard(tmp_path / "a.h5", rows=20, failed=range(18)))
    assert len(choose([shard], 10)) == 10


def test_spread_takes_from_everywhere() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7]
    assert spread(range(3), 4) == [0, 1, 2]
    assert spread(range(3), 0) == [0, 1, 2]


def test_without_pictures_the_page_says_how_to_get_them(shards: list[Shard], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(page, cache_statistics(shards), sample=12)
    text = page.read_text(encoding="utf-8")
    assert "extract run --thumbnails" in text
    assert "12 of 40 rows, evenly spread; 3 of them failed" in text
    assert text.count('<svg viewBox="0 0 100 100"') == 9
    assert "data:image/jpeg" not in text
    assert text.count("<li ") == 12
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_features_that_are_no_numbers_are_counted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "a.h5", header(["a"] * 6)) as writer:
        for row, value in enumerate((1, math.nan, math.inf, -math.inf, 2, 3)):
            writer.write([dataclasses.replace(outcome(row), features=np.full((TOKENS, WIDTH), value, "<f2"))])
        writer.finish()
    figures = inspect(InspectConfig(out=tmp_path, html=tmp_path / "page.html"))
    said = capsys.readouterr()
    assert "3 of 6 sampled rows hold NaN or infinite features" in said.err
    assert (figures["not_finite_rows"], figures["token_norms"]["p100"]) == (3, round(3 * WIDTH**0.5, 3))
    assert "3 rows hold NaN or infinite features" in (tmp_path / "page.html").read_text(encoding="utf-8")
    with ShardWriter(tmp_path / "b/b.h5", header(["a"])) as writer:
        writer.write([dataclasses.replace(outcome(0), features=np.full((TOKENS, WIDTH), math.nan, "<f2"))])
        writer.finish()
    assert inspect(InspectConfig(out=tmp_path / "b", html=tmp_path / "b.html"))["token_norms"]["p100"] == 0
