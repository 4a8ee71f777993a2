"""`extract curate` on a cache with spoiled rows, and what `train` does with its list."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from llava_align.config import MODELS
from llava_align.demo.world.captions import short_caption
from llava_align.demo.world.render import jpeg, render
from llava_align.demo.world.scene import random_scene
from llava_core.errors import LlavaError
from llava_core.filesystem import Lock
from llava_core.shards.reader import Shard
from llava_core.shards.row_list import read_row_list
from llava_core.shards.writer import ShardWriter
from llava_core.vision.open import open_vision_tower
from tests.support.browser import dom_of
from tests.support.commands import Ended, call, largest_file, run
from tests.support.runs import config, flags_of
from tests.support.sabotaged import FAILED, ROWS, write_sabotaged
from tests.support.shards import TOKENS, header, outcome, write_shard
from tests.support.sweeps import command, results, sweep
from train.resources import TrainingResources

Spoiled = dict[str, list[tuple[str, int]]]


@pytest.fixture(scope="module")
def spoiled(world: Path) -> Spoiled:
    return write_sabotaged(world / "spoiled")


@pytest.fixture(scope="module")
def curated(world: Path, spoiled: Spoiled) -> tuple[Path, Ended]:
    out, page = world / "list.parquet", world / "curated.html"
    command = ("extract", "curate", "--features", world / "spoiled", "--out", out, "--html", page, "--json")
    return out, run(*command)


def reasons_of(path: Path) -> dict[tuple[str, int], str]:
    table = pq.read_table(path)
    places = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    return dict(zip(places, table["reason"].to_pylist(), strict=True))


def test_spoiled_rows_are_found_and_others_kept(curated: tuple[Path, Ended], spoiled: Spoiled) -> None:
    reasons = reasons_of(curated[0])
    for reason, rows in spoiled.items():
        found = [reasons[row] for row in rows]
        assert found.count(reason) >= 0.9 * len(rows), (reason, found)
    of_spoiled = [reasons.pop(row) for rows in spoiled.values() for row in rows]
    assert sum(map(bool, of_spoiled)) >= 0.95 * len(of_spoiled)
    assert sum(map(bool, reasons.values())) <= 0.05 * len(reasons)


def test_the_list_says_what_was_found(curated: tuple[Path, Ended], spoiled: Spoiled, world: Path) -> None:
    path, ended = curated
    table, figures = pq.read_table(path), ended.summary
    assert table.num_rows == 2 * (ROWS - 1)  # all but the failed ones
    assert figures["rows"] == 2 * (ROWS - 2)  # those with features
    assert figures["kept"] == sum(not r for r in table["reason"].to_pylist()) - 2  # and two about no picture
    assert sum(figures["by_reason"].values()) == figures["rows"]
    uids = {name: Shard(world / f"spoiled/{name}").layout.uid for name in ("a.h5", "b.h5")}
    assert dict(zip(table["shard"].to_pylist(), table["uid"].to_pylist(), strict=True)) == uids
    lines = {(line["shard"], line["row"]): line for line in table.to_pylist()}
    assert lines["a.h5", FAILED + 1]["similarity"] is None
    twice = [lines[row] for row in spoiled["near-duplicate"] if lines[row]["reason"] == "near-duplicate"]
    assert all(line["duplicate_of"] == f"{line['shard']} {line['row'] - 1}" for line in twice)
    wrong = lines[spoiled["caption of another picture"][0]]
    assert wrong["p"] > figures["mismatched"]
    assert wrong["similarity"] < figures["similarity"]
    assert "--score fit (no text tower)" in ended.err
    assert "--language zh: that of most captions" in ended.err
    assert "near-duplicates dropped although their captions differ: " in ended.err


def test_the_same_cache_gives_the_same_list(curated: tuple[Path, Ended], world: Path, tmp_path: Path) -> None:
    again = tmp_path / "new/again.parquet"
    call("extract", "curate", "--features", world / "spoiled", "--out", again)
    one, other = (pq.read_table(path) for path in (curated[0], again))
    for column in ("uid", "row", "reason", "duplicate_of"):
        assert one[column].to_pylist() == other[column].to_pylist()
    for column in ("similarity", "p"):  # of parallel sums, whose last digits differ
        np.testing.assert_allclose(one[column].to_numpy(), other[column].to_numpy(), atol=1e-3)
    assert read_row_list(again).sha256 == read_row_list(curated[0]).sha256


def test_the_page_shows_every_reason(curated: tuple[Path, Ended], world: Path, tmp_path: Path) -> None:
    dom = dom_of(world / "curated.html", tmp_path)
    for reason in ("kept", "near-duplicate", "caption of another picture", "blank features"):
        assert f'data-outcome="{reason}"' in dom
        assert f"<option>{reason}</option>" in dom
    assert re.search(r"\b(\d+) / \1\b", dom)


def test_rules_can_be_switched_off(world: Path, spoiled: Spoiled, tmp_path: Path) -> None:
    flags = (
        "--score",
        "none",
        "--unordered",
        1,
        "--same-picture",
        2,
        "--language",
        "any",
        "--least-width",
        0,
        "--most-repeats",
        999,
    )
    call("extract", "curate", "--features", world / "spoiled", "--out", tmp_path / "all.parquet", *flags)
    assert set(reasons_of(tmp_path / "all.parquet").values()) == {"", "blank features", "no caption"}
    other = ("--language", "other", "--score", "none", "--unordered", 1)
    call("extract", "curate", "--features", world / "spoiled", "--out", tmp_path / "en.parquet", *other)
    kept = [place for place, reason in reasons_of(tmp_path / "en.parquet").items() if not reason]
    assert set(spoiled["other language"]) <= set(kept)


def test_a_run_trains_on_the_rows_that_are_kept(
    curated: tuple[Path, Ended], world: Path, tmp_path: Path
) -> None:
    given = config(world, tmp_path / "run", features=world / "spoiled", rows=str(curated[0]), max_steps=4)
    ended = call("train", "run", *flags_of(given))
    kept = curated[1].summary["kept"]
    assert f"{kept} samples" in ended.err
    assert f"{kept + 2:,} of {2 * (ROWS - 2):,} rows: --rows {curated[0]} keeps these" in ended.err
    samples, _ = TrainingResources(given).samples(given)
    reasons = reasons_of(curated[0])
    assert not any(reasons["ab"[shard] + ".h5", row] for shard, row in samples.rows.tolist())
    state = torch.load(tmp_path / "run/last/state.pt", weights_only=True)
    assert state["rows"]["row_list"] == read_row_list(curated[0]).sha256
    # With the language model, rows about no picture train, too, if they are listed.
    tuned, _ = TrainingResources(given).samples(dataclasses.replace(given, tune="lora"))
    assert len(tuned) == kept + 2
    few, _ = TrainingResources(given).samples(dataclasses.replace(given, max_samples=9))
    assert few.rows.tolist() == samples.rows[:9].tolist()


def test_a_run_continues_with_its_own_list_alone(
    curated: tuple[Path, Ended], world: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(curated[0].read_bytes())
    given = config(world, tmp_path / "run", features=world / "spoiled", rows=str(mine), max_steps=2)
    call("train", "run", *flags_of(given))
    mine.rename(tmp_path / "moved.parquet")
    moved = dataclasses.replace(given, rows=str(tmp_path / "moved.parquet"))
    assert "is finished; nothing to do" in call("train", "run", *flags_of(moved)).err
    table = pq.read_table(curated[0])
    kept = table["reason"].to_pylist().index("")
    pq.write_table(pa.concat_tables([table.slice(0, kept), table.slice(kept + 1)]), mine)
    for rows in (str(mine), "all"):
        other = dataclasses.replace(given, rows=rows)
        line = call("train", "run", *flags_of(other), code=1).one_line()
        assert f"{tmp_path / 'run'} holds a run with another --rows; expected {mine} " in line


def test_a_sweep_compares_lists(curated: tuple[Path, Ended], world: Path, tmp_path: Path) -> None:
    given = sweep(
        world, tmp_path / "sweep", f"rows=all,{curated[0]}", features=world / "spoiled", max_steps=2
    )
    ended = call(*command(given))
    assert f"rows={curated[0]}" in ended.err
    assert sorted(line["rows"] for line in results(given.out).values()) == sorted(["all", str(curated[0])])


def test_a_sweep_ends_if_one_of_its_lists_is_edited(
    curated: tuple[Path, Ended], world: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_bytes(curated[0].read_bytes())
    given = sweep(world, tmp_path / "sweep", f"rows=all,{mine}", features=world / "spoiled", max_steps=2)
    call(*command(dataclasses.replace(given, trials=1)))
    pq.write_table(pq.read_table(mine).slice(9), mine)
    line = call(*command(given), code=1).one_line()
    assert f"the training rows of --rows {mine} of the sweep in {given.out} have changed since it" in line


def _other_cache(table: pa.Table) -> pa.Table:
    return table.set_column(1, "uid", pa.array([uid[::-1] for uid in table["uid"].to_pylist()]))


def _rows_beyond(table: pa.Table) -> pa.Table:
    return table.set_column(2, "row", pa.array([ROWS, *table["row"].to_pylist()[1:]]))


def _failed_rows(table: pa.Table) -> pa.Table:
    return table.set_column(2, "row", pa.array([FAILED, *table["row"].to_pylist()[1:]]))


def _none_kept(table: pa.Table) -> pa.Table:
    reasons = pa.array(["of mine"] * table.num_rows)
    return table.set_column(table.column_names.index("reason"), "reason", reasons)


def _without(name: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = [None, *table[name].to_pylist()[1:]]
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return change


def _as_lists(table: pa.Table) -> pa.Table:
    return table.set_column(1, "uid", pa.array([[uid] for uid in table["uid"].to_pylist()]))


def _true_or_false(table: pa.Table) -> pa.Table:
    dropped = pa.array([bool(reason) for reason in table["reason"].to_pylist()])
    return table.set_column(table.column_names.index("reason"), "reason", dropped)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_cache, "is not of the cache {world}/spoiled; got rows of another a.h5; make a list of this"),
        (_rows_beyond, f"a row of a.h5 in {{path}}; expected 0 to {ROWS - 1}; got {ROWS}; make a list"),
        (_failed_rows, f"keeps row {FAILED} of a.h5, which has no features; got http 4xx; make a list"),
        (_none_kept, "{path} keeps no row; got 598 rows with a reason; make a list of this cache"),
        (
            lambda table: table.drop_columns(["uid"]),
            "is no row list; expected columns shard, uid, row; got no",
        ),
        (
            lambda table: pa.concat_tables([table, _none_kept(table)]),
            "{path} lists row 0 of a.h5 twice, as kept and with a reason; leave one of the two lines",
        ),
        (_without("row"), "{path} is no row list; got a line without a row; make a list of this cache"),
        (_without("uid"), "{path} is no row list; got a line without a uid; make a list of this cache"),
        (_as_lists, "{path} is no row list; got Unsupported cast from list"),
        (_true_or_false, "is no row list; expected reason as text, empty for a row that is kept; got bool"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused(
    change: Callable[[pa.Table], pa.Table],
    expected: str,
    curated: tuple[Path, Ended],
    world: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "list.parquet"
    pq.write_table(change(pq.read_table(curated[0])), path)
    for name in ("run", "plan"):
        given = config(world, tmp_path / "run", features=world / "spoiled", rows=str(path))
        line = call("train", name, *flags_of(given), code=1).one_line()
        assert expected.format(world=world, path=path) in line
    assert not (tmp_path / "run").exists()


def test_a_damaged_list_is_not_read(curated: tuple[Path, Ended], tmp_path: Path) -> None:
    whole = curated[0].read_bytes()
    data = pq.ParquetFile(curated[0]).metadata.row_group(0)
    for k in range(data.num_columns):
        column = data.column(k)
        damaged = bytearray(whole)
        damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        with pytest.raises(LlavaError, match="is no row list"):
            read_row_list(tmp_path / "damaged.parquet")


def test_an_edited_list_need_not_have_all_columns_and_shards(
    curated: tuple[Path, Ended], world: Path, tmp_path: Path
) -> None:
    table = pq.read_table(curated[0])
    some = [k for k, name in enumerate(table["shard"].to_pylist()) if name == "a.h5" and k % 2]
    edited = table.take(some).select(["shard", "uid", "row"])
    edited = edited.append_column("reason", pa.array([" ", *[None] * (len(some) - 1)]))
    pq.write_table(pa.concat_tables([edited, edited.slice(0, 1)]), tmp_path / "edited.parquet")
    given = config(world, tmp_path / "run", features=world / "spoiled", rows=str(tmp_path / "edited.parquet"))
    ended = call("train", "plan", *flags_of(given))
    assert f"{len(some)} of {2 * (ROWS - 2)} rows: --rows {given.rows} keeps these" in ended.err
    assert "left out: 1 shard, such as b.h5, of which that list has no row" in ended.err


def test_only_lists_and_pages_are_replaced(world: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "cache/a.h5")
    given = ("extract", "curate", "--features", tmp_path / "cache", "--language", "any")
    shard, (page, out) = tmp_path / "cache/a.h5", (tmp_path / name for name in ("page.html", "list.parquet"))
    whole = shard.read_bytes()
    line = call(*given, "--out", shard, code=2).one_line()
    assert (
        f"--out; expected a new file, or a row list to replace; got {shard}, which is something els" in line
    )
    line = call(*given, "--out", out, "--html", shard, code=2).one_line()
    assert f"--html; expected a new file, or such a one to replace; got {shard}, which is something" in line
    inspected = ("extract", "inspect", "--out", tmp_path / "cache", "--html", shard)
    assert "--html; expected a new file, or such" in call(*inspected, code=2).one_line()
    assert shard.read_bytes() == whole
    line = call(*given, "--out", out, "--html", out, code=2).one_line()
    assert "--html; expected another file than --out, which is no page" in line
    line = call(*given, "--out", shard / "list.parquet", code=2).one_line()
    assert f"--out; expected a file in a folder; got one in the file {shard}" in line
    for _ in range(2):  # the second time both are there
        call(*given, "--out", out, "--html", page)
    with Lock(out):
        assert f"{out} is being written; got by process" in call(*given, "--out", out, code=1).one_line()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "list.parquet", "page.html"]


def test_a_full_disk_is_named_and_leaves_the_list_that_was(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.parquet"
    given = ("extract", "curate", "--features", world / "features", "--language", "any", "--out", out)
    call(*given)
    before = out.read_bytes()
    with largest_file(1024):
        line = call(*given, code=1).one_line()
    assert line.endswith(f"File too large: {out}")
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["list.parquet"]


def test_copies_of_a_shard_and_names_that_are_no_text(world: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "one/a.h5", caption="一个圆形")
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/a.h5", tmp_path / "two/b.h5")
    given = ("extract", "curate", "--out", tmp_path / "list.parquet", "--html", tmp_path / "page.html")
    line = call(*given, "--features", tmp_path / "one", tmp_path / "two", code=1).one_line()
    assert f"{tmp_path / 'two/b.h5'} is a copy of {tmp_path / 'one/a.h5'}; give --features one of" in line
    os.rename(tmp_path / "two/b.h5", os.fsencode(tmp_path / "two") + b"/\xff.h5")
    call(*given, "--features", tmp_path / "two")
    assert set(pq.read_table(tmp_path / "list.parquet")["shard"].to_pylist()) == {"?.h5"}
    rows = config(world, tmp_path / "run", features=tmp_path / "two", rows=str(tmp_path / "list.parquet"))
    assert "12 of 12 rows" in call("train", "plan", *flags_of(rows)).err


def test_captions_that_are_all_one_text_are_not_scored(world: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "same/a.h5", header(["一张很好看的图片在这里"] * 300)) as writer:
        features = rng.normal(size=(300, TOKENS, 12)).astype("<f2")
        writer.write([dataclasses.replace(outcome(k), features=row) for k, row in enumerate(features)])
        writer.finish()
    given = ("--out", tmp_path / "list.parquet", "--html", tmp_path / "page.html", "--most-repeats", 300)
    for flags in ((), ("--mismatched", 0.01)):
        ended = call("extract", "curate", "--features", tmp_path / "same", *given, *flags, "--json")
        assert "pairs not scored: 0 shuffled pairs with another caption, 100 needed" in ended.err
        assert (ended.summary["score"], ended.summary["kept"]) == ("none", 300)


def test_other_files_and_flags_are_refused(curated: tuple[Path, Ended], world: Path, tmp_path: Path) -> None:
    absent = sweep(world, tmp_path / "sweep", f"rows=all,{tmp_path / 'absent.parquet'}", max_steps=2)
    expected = f"no file {tmp_path / 'absent.parquet'}; give --rows one that is there"
    assert expected in call(*command(absent), code=1).one_line()
    write_shard(tmp_path / "a/a.h5", size=64)
    unlike = ("--features", tmp_path / "a", world / "features", "--out", tmp_path / "list.parquet")
    line = call("extract", "curate", *unlike, code=1).one_line()
    assert "give one kind: with --fuse, the list of any of the fused caches serves" in line
    (tmp_path / "no.parquet").write_text("not a table")
    given = config(world, tmp_path / "run", features=world / "spoiled")
    for rows, code, expected in (
        (tmp_path / "no.parquet", 1, "is no row list; got "),
        (tmp_path / "absent.parquet", 1, "no file"),
        (tmp_path, 2, "--rows; expected a file"),
    ):
        flags = flags_of(dataclasses.replace(given, rows=str(rows)))
        assert expected in call("train", "run", *flags, code=code).one_line()
    flags = [*flags_of(dataclasses.replace(given, rows=str(curated[0]))), "--text", str(curated[0])]
    assert (
        "--rows beside --text; expected one of them; leave --text out"
        in call("train", "run", *flags, code=2).one_line()
    )
    flags = flags_of(config(world, tmp_path / "run", rows=str(curated[0])))  # of the world's own cache
    assert (
        f"is not of the cache {world / 'features'}; got rows of another a.h5"
        in call("train", "run", *flags, code=1).one_line()
    )


def test_lists_of_a_fused_encoder_and_of_an_evaluation(
    curated: tuple[Path, Ended], world: Path, tmp_path: Path
) -> None:
    """A list of one cache is one of the caches that are fused with it; `train eval` takes lists, too."""
    for name in ("a", "b"):
        write_shard(tmp_path / f"one/{name}.h5", rows=20)
        write_shard(tmp_path / f"two/{name}.h5", rows=20, size=64)
    listed = tmp_path / "list.parquet"
    flags = ("--language", "any", "--score", "none")
    call("extract", "curate", "--features", tmp_path / "two", "--out", listed, *flags)
    table = pq.read_table(listed)
    kept = kept_rows(table)
    both = (tmp_path / "one", tmp_path / "two")
    given = config(
        world, tmp_path / "run", features=both, eval_features=None, fuse="channels", rows=str(listed)
    )
    call("train", "run", *flags_of(dataclasses.replace(given, max_steps=1)))
    samples, _ = TrainingResources(given).samples(given)
    assert len(samples) == kept
    single = config(world, tmp_path / "single", features=tmp_path / "two", eval_features=None, max_steps=1)
    call("train", "run", *flags_of(single))
    judged = (
        "--checkpoint",
        tmp_path / "single/last",
        "--features",
        tmp_path / "two",
        "--llm",
        world / "llm",
    )
    assert f"{kept} held-out samples" in call("train", "eval", *judged, "--rows", listed).err


def kept_rows(table: pa.Table) -> int:
    return sum(not reason for reason in table["reason"].to_pylist())


def test_too_few_rows_are_not_fitted(world: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "list.parquet")
    ended = call("extract", "curate", "--features", world / "held-out", *out, "--json")
    assert "pairs not scored: fewer than 256 rows to fit on, and no --vision" in ended.err
    assert ended.summary["score"] == "none"
    line = call(
        "extract", "curate", "--features", world / "held-out", *out, "--score", "fit", code=1
    ).one_line()
    assert "--score fit; expected 256 rows or more; got 10" in line
    flags = ("--least-width", 999, "--language", "any")
    line = call("extract", "curate", "--features", world / "held-out", "--out", tmp_path / "none.parquet",
                *flags, code=1).one_line()  # fmt: skip
    assert "no row is left, so no list is written" in line
    assert not (tmp_path / "none.parquet").exists()


def test_wrong_flags_are_refused(world: Path, tmp_path: Path) -> None:
    given = ("extract", "curate", "--features", world / "features", "--out", tmp_path / "list.parquet")
    for flags, expected in (
        (
            ("--score", "text-tower"),
            "--score text-tower without --vision; give --vision the encoder's folder",
        ),
        (("--mismatched", 2), "--mismatched; expected a share from 0 to 1"),
        (("--same-picture", 0), "--same-picture; expected a number above 0"),
        (("--least-width", -1), "--least-width; expected 0 or more; got -1"),
        (("--sample", -1), "--sample"),
    ):
        assert expected in call(*given, *flags, code=2).one_line()
    line = call("extract", "curate", "--features", world / "features", "--out", tmp_path, code=2).one_line()
    assert "--out; expected a file" in line


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """200 pictures of the demo's world by its own encoder, and the rows whose captions are of others."""
    folder = tmp_path_factory.mktemp("drawn")
    rng, tower = random.Random(0), open_vision_tower(MODELS / "vision")
    scenes = [random_scene(rng) for _ in range(200)]
    captions = [short_caption(scene, rng) for scene in scenes]
    wrong = rng.sample(range(200), 40)
    before = [captions[row] for row in wrong]
    for k, row in enumerate(wrong):
        captions[row] = before[k - 1]
    pixels = [tower.preprocess.decode_image(jpeg(render(scene, rng))).pixels for scene in scenes]
    for name, layer in (("last", None), ("before", -2)):
        own = open_vision_tower(MODELS / "vision", layer=layer)
        features = own.encode(np.stack(pixels)).numpy().astype("<f2")
        made = dataclasses.replace(
            header(captions), encoder=own.encoder, preprocess=own.preprocess.to_json(),
            tokens=own.tokens, width=own.width, storage="int8",
        )  # fmt: skip
        with ShardWriter(folder / name / "a.h5", made) as writer:
            writer.write([dataclasses.replace(outcome(k), features=row) for k, row in enumerate(features)])
            writer.finish()
    return folder, wrong


def test_a_text_tower_tells_captions_of_others(drawn: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, wrong = drawn
    given = ("extract", "curate", "--features", folder / "last", "--out", tmp_path / "list.parquet")
    ended = call(*given, "--vision", MODELS / "vision", "--same-picture", 2, "--json")
    assert "--score text-tower (no fit of so few rows)" in ended.err
    reasons = reasons_of(tmp_path / "list.parquet")
    dropped = {row for (_, row), reason in reasons.items() if reason}
    assert len(dropped & set(wrong)) >= 0.95 * len(wrong)
    assert len(dropped - set(wrong)) <= 0.05 * 160
    assert 0.1 < ended.summary["wrong"] < 0.3


def test_features_that_no_text_tower_takes_are_refused(drawn: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, _ = drawn
    out = ("--out", tmp_path / "list.parquet", "--same-picture", 2)
    given = ("extract", "curate", "--features", folder / "before", *out, "--vision", MODELS / "vision")
    line = call(*given, "--score", "text-tower", code=1).one_line()
    assert "lacks what the text tower is compared with; expected tokens after the last layer norm" in line
    assert "got those of layer 3; use --score fit, which any cache allows" in line
    assert "no text tower for features of layer 3" in call(*given).err
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "dinov2")
    tower = open_vision_tower(tmp_path / "dinov2")
    made = dataclasses.replace(
        header(["红色的圆形"] * 3), encoder=tower.encoder, preprocess=tower.preprocess.to_json(),
        tokens=tower.tokens, width=tower.width,
    )  # fmt: skip
    with ShardWriter(tmp_path / "of-dinov2/a.h5", made) as writer:
        random_features = np.random.default_rng(0).normal(size=(3, tower.tokens, tower.width)).astype("<f2")
        writer.write([dataclasses.replace(outcome(k), features=random_features[k]) for k in range(3)])
        writer.finish()
    given = ("extract", "curate", "--features", tmp_path / "of-dinov2", *out, "--vision", tmp_path / "dinov2")
    line = call(*given, "--score", "text-tower", code=1).one_line()
    assert f"{tmp_path / 'dinov2'} has no text tower; expected Chinese-CLIP from ModelScope, or" in line
    assert line.endswith("use --score fit, which any cache allows")
    assert f"{tmp_path / 'dinov2'} has no text tower" in call(*given).err
    given = ("extract", "curate", "--features", folder / "last", *out, "--vision", tmp_path / "dinov2")
    assert "holds features of another encoder" in call(*given, code=1).one_line()
