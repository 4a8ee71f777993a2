"""Every form of local data, as rows; and where an image may come from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.sources.base import Columns, DataFlags, host_of, hosts_of
from extract.sources.find import find_sources
from extract.sources.local_images import LocalImages, read_image
from extract.sources.stored_images import StoredImages
from extract.statistics import write_statistics
from llava_core.errors import LlavaError
from llava_core.row_status import Outcome, Status
from llava_core.shards.reader import Shard
from llava_core.tables.conversations import conversation_turns
from llava_core.tables.image_values import ParquetImages
from tests.support.local_data import llava, write_json, write_parquet, write_pictures
from tests.support.paths import ROOT
from tests.support.shards import write_shard

MOST = 20_000_000


def rows_of(data: object, images: Path | None = None) -> Columns:
    (source,) = find_sources(str(data), DataFlags(images=images))
    return source.read()


def bodies(rows: Columns) -> list[bytes | str]:
    """What each image is, or the label of why there is none."""
    assert rows.images is not None
    found: list[bytes | str] = []
    for row in range(len(rows.image_refs)):
        fetched = rows.images.load(row, MOST)
        assert fetched is not None
        found.append(fetched.body if fetched.status is Status.OK else fetched.status.label)
    return found


def test_a_folder_of_images_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "我的 图片 v1.5"
    names = ["IMG 02.JPG", "a.png", "sub/深/猫.jpeg", "sub/b.webp", "三.jpg", "z.jpg", "u.jpg"]
    pictures = write_pictures(folder, names)
    write_pictures(folder, [".hidden.jpg", ".cache/x.jpg"])
    for name, caption in [
        ("IMG 02.txt", "第二张\n".encode("utf-8-sig")),
        ("a.TXT", b"a cat"),
        ("sub/深/猫.txt", "一只猫".encode()),
        ("sub/b.txt", "国标码".encode("gbk")),
        ("三.txt", b"  \n"),
        ("z.txt", "utf-16".encode("utf-16")),
        ("u.caption", b"a caption"),
        ("README.md", b""),
    ]:
        (folder / name).write_bytes(caption)
    (source,) = find_sources(str(folder))
    assert (source.stem, source.rows) == ("我的 图片 v1.5", 7)
    rows = source.read()
    assert rows.image_refs == sorted(names)
    texts = dict(zip(rows.image_refs, rows.captions, strict=True))
    assert texts == {
        "IMG 02.JPG": "第二张", "a.png": "a cat", "sub/深/猫.jpeg": "一只猫", "sub/b.webp": None,
        "三.jpg": None, "z.jpg": None, "u.jpg": "a caption",
    }  # fmt: skip
    assert rows.ids[:2] == ["IMG 02", "a"]
    assert bodies(rows) == [pictures[names.index(place)] for place in rows.image_refs]
    assert not rows.conversations


def test_a_folder_is_another_once_a_name_or_a_caption_is(tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", ["a.jpg", "b.jpg"])
    seen = [find_sources(str(tmp_path / "set"))[0].identity()]
    assert find_sources(str(tmp_path / "set"))[0].identity() == seen[0]
    (tmp_path / "set/b.txt").write_text("new")
    seen.append(find_sources(str(tmp_path / "set"))[0].identity())
    seen.append(find_sources(str(tmp_path / "set"), limit=1)[0].identity())
    (tmp_path / "set/a.jpg").rename(tmp_path / "set/c.jpg")
    seen.append(find_sources(str(tmp_path / "set"))[0].identity())
    assert len({str(identity) for identity in seen}) == 4


@pytest.mark.parametrize("lines", [False, True])
def test_llava_json(tmp_path: Path, lines: bool) -> None:
    pictures = write_pictures(tmp_path / "images", ["coco/1 一.jpg", "2.JPG"])
    entries: list[Any] = [
        llava("coco/1 一.jpg", "<image>\n这是什么？", "一只猫", "颜色呢？\n", " 黑色 "),
        llava("2.JPG", "<image>", "<image>狗"),
        llava("missing.jpg", "q", "a"),
        {"id": 7, "conversations": llava("", "q", "a")["conversations"]},
        llava("2.JPG", "q"),
        llava("2.JPG", "q", ""),
        {"image": ["2.JPG"], "conversations": "?"},
        {"image": "2.JPG", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                                        {"role": "assistant", "content": "a"}]},
        {"image": "2.JPG", "conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]},
        {"image": "2.JPG", "messages": [{"from": "user", "value": 1}, {"from": "gpt", "value": "a"}]},
    ]  # fmt: skip
    path = write_json(tmp_path / "train.json", entries)
    if lines:
        text = "\n\n".join(map(json.dumps, entries))
        path.unlink()
        path = path.with_suffix(".jsonl")
        path.write_text(text, encoding="utf-8-sig")
    rows = rows_of(path, tmp_path / "images")
    assert rows.conversations
    assert rows.captions == [
        '[["这是什么？","一只猫"],["颜色呢？","黑色"]]',
        '[[null,"<image>狗"]]',
        '[["q","a"]]',
        '[["q","a"]]',
        None,
        None,
        '[[null,"?"]]',
        '[{"system":"s"},["q","a"]]',
        None,
        None,
    ]
    assert rows.ids[:5] == ["id of coco/1 一.jpg", "id of 2.JPG", "id of missing.jpg", "7", "id of 2.JPG"]
    one, two = pictures
    assert bodies(rows) == [one, two, "no file", "no file", two, two, two, two, two, two]
    assert rows.outcomes == {3: Outcome(Status.TEXT_ONLY)}


def test_parquet_with_paths_beside_it_or_in_a_folder_that_is_named(tmp_path: Path) -> None:
    names = ["a.jpg", "b/c.jpg"]
    pictures = write_pictures(tmp_path / "data", names)
    for column in ("image", "path", "url"):
        path = write_parquet(tmp_path / "data/x.parquet", **{column: names, "caption": ["x", "y"]})
        assert bodies(rows_of(path)) == pictures
        path = write_parquet(tmp_path / "elsewhere/x.parquet", **{column: names, "text": ["x", "y"]})
        assert bodies(rows_of(path, tmp_path / "data")) == pictures
        with pytest.raises(LlavaError, match=r"none of the images that .* is in .*elsewhere; got 'a\.jpg'"):
            rows_of(path)


def test_parquet_whose_images_are_at_addresses_needs_no_files(tmp_path: Path) -> None:
    urls = ["http://example.org/a.jpg", "nonsense", None]
    assert rows_of(write_parquet(tmp_path / "x.parquet", url=urls, caption=list("abc"))).images is None
    assert rows_of(write_parquet(tmp_path / "z.parquet", url=["", None], caption=list("ab"))).images is None
    mixed = rows_of(write_parquet(tmp_path / "y.parquet", image=urls, caption=list("abc")))
    assert mixed.images is not None
    assert mixed.images.load(0, MOST) is None
    assert (
        bodies(Columns(mixed.image_refs[1:], [], [], LocalImages(tmp_path, mixed.image_refs[1:])))
        == ["no file"] * 2
    )


def test_parquet_with_bytes_as_data_sets_are_stored(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    a, b, c, _ = write_pictures(tmp_path, names)
    structs = [
        {"bytes": a, "path": "x/1.jpg"},
        {"bytes": b, "path": None},
        {"bytes": None, "path": "c.jpg"},
        None,
    ]
    dialogue = [[{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]] * 3 + [None]
    rows = rows_of(write_parquet(tmp_path / "s.parquet", image=structs, conversations=dialogue, url=names))
    assert rows.image_refs == ["x/1.jpg", "", "c.jpg", ""]
    assert rows.captions == ['[["q","a"]]'] * 3 + [None]
    assert bodies(rows) == [a, b, c, "no file"]

    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 3
    plain = rows_of(write_parquet(tmp_path / "p.parquet", image=[a, None, b""], messages=messages))
    assert (plain.image_refs, plain.captions) == ([""] * 3, ['[["q","a"]]'] * 3)
    assert bodies(plain) == [a, "no file", b""]
    assert plain.images is not None
    fetched = plain.images.load(0, len(a) - 1)
    assert fetched is not None
    assert fetched.status is Status.TOO_LARGE


def test_a_path_may_not_leave_the_folder_but_its_links_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    a, outside = write_pictures(tmp_path, ["images/a.jpg", "outside.jpg"])
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "images2").mkdir()
    (tmp_path / "images2/b.jpg").write_bytes(outside)
    ends = {
        "a.jpg": Status.OK,
        str(folder / "a.jpg"): Status.OK,
        "sub/../a.jpg": Status.OK,
        "link/outside.jpg": Status.OK,
        "../outside.jpg": Status.OUTSIDE_FOLDER,
        "../images2/b.jpg": Status.OUTSIDE_FOLDER,
        "link/../../outside.jpg": Status.OUTSIDE_FOLDER,
        str(tmp_path / "outside.jpg"): Status.OUTSIDE_FOLDER,
        "/dev/zero": Status.OUTSIDE_FOLDER,
        "A.jpg": Status.NO_FILE,
        "a.jpg/b": Status.NO_FILE,
        "sub": Status.NO_FILE,
        "": Status.NO_FILE,
        "pipe.jpg": Status.NO_FILE,
        "a\0.jpg": Status.NO_FILE,
        "\ud800.jpg": Status.NO_FILE,
        "loop.jpg": Status.UNREADABLE_FILE,
        "n" * 5000: Status.UNREADABLE_FILE,
    }
    found = {place: read_image(folder, place, MOST) for place in ends}
    assert {place: fetched.status for place, fetched in found.items()} == ends
    assert found["a.jpg"].body == a
    assert found["link/outside.jpg"].body == outside
    assert read_image(folder, "a.jpg", len(a) - 1).status is Status.TOO_LARGE
    monkeypatch.chdir(tmp_path)
    assert read_image(Path("images"), "a.jpg", MOST).body == a
    assert read_image(Path("/"), str(tmp_path / "outside.jpg"), MOST).body == outside


def random_bytes(rows: int, size: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.bytes(size + row % 7) for row in range(rows)]


def stored_images(path: Path, rows: int) -> StoredImages:
    return StoredImages(ParquetImages(path, "image").value, LocalImages(path.parent, [""] * rows))


def stored(path: Path, images: list[bytes], **options: Any) -> StoredImages:
    table = pa.table({"image": pa.array(images, pa.binary()), "caption": ["x"] * len(images)})
    pq.write_table(table, path, **options)
    return stored_images(path, len(images))


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "threads"])
def test_stored_images_in_any_order(tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.tables.image_values.BATCH_BYTES", 20_000)
    images = random_bytes(300, 1000)
    store = stored(tmp_path / "x.parquet", images, row_group_size=130)
    rows = list(range(300))
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    elif order == "backwards":
        rows.reverse()

    def load(row: int) -> bytes:
        fetched = store.load(row, MOST)
        assert fetched is not None
        return fetched.body

    with ThreadPoolExecutor(8 if order == "threads" else 1) as pool:
        assert list(pool.map(load, rows)) == [images[row] for row in rows]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_core.tables.image_values.BATCH_BYTES", 20_000)
    path, images = tmp_path / "x.parquet", random_bytes(300, 1000)
    stored(path, images, row_group_size=100, use_dictionary=False, data_page_size=1000, write_batch_size=20)
    data = bytearray(path.read_bytes())
    at = data.index(images[150])
    data[at - 200 : at + 50_000] = bytes(50_200)  # page headers among them
    path.write_bytes(data)
    store = stored_images(path, 300)
    ends = [store.load(row, MOST) for row in range(300)]
    status = [end.status for end in ends if end is not None]
    assert status[:100] == status[200:] == [Status.OK] * 100
    assert Status.OK in status[100:150]
    assert set(status[150:200]) == {Status.UNREADABLE_FILE}
    assert [end.body for end in ends[200:] if end is not None] == images[200:]


READ_ALL = """
import sys
from pathlib import Path
from extract.sources.local_images import LocalImages
from extract.sources.stored_images import StoredImages
from llava_core.tables.image_values import ParquetImages

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

path, rows = Path(sys.argv[1]), int(sys.argv[2])
store = StoredImages(ParquetImages(path, "image").value, LocalImages(path.parent, [""] * rows))
before = peak()
assert sum(len(store.load(row, 10**9).body) for row in range(rows)) > 400e6
print(peak() - before)
"""


def test_one_giant_row_group_does_not_fill_the_memory(tmp_path: Path) -> None:
    rows = 4000
    options = {"row_group_size": rows, "use_dictionary": False, "write_batch_size": 16, "compression": "none"}
    stored(tmp_path / "x.parquet", random_bytes(rows, 100_000), **options)
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.num_row_groups == 1
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / "x.parquet"), str(rows)]
    grown = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert grown < 200e6


def test_what_a_folder_means(tmp_path: Path) -> None:
    """Parquet files, or JSON files without the statistics of shards, or images."""
    write_pictures(tmp_path / "set", ["a.jpg"])
    write_json(tmp_path / "set/features/set.json", {"version": 1})
    (tmp_path / "set/features/set.h5").touch()
    write_json(tmp_path / "set/.cache/x.json", {})
    assert [source.stem for source in find_sources(str(tmp_path / "set"))] == ["set"]
    shard = Shard(write_shard(tmp_path / "set/features/集 1.h5"))
    write_statistics(shard, seconds=1.0)
    shard.path.unlink()
    assert [source.stem for source in find_sources(str(tmp_path / "set"))] == ["set"]
    write_json(tmp_path / "set/deep/b.json", [llava("a.jpg", "q", "a")])
    assert [source.stem for source in find_sources(str(tmp_path / "set"))] == ["b"]
    write_parquet(tmp_path / "set/c.parquet", path=["a.jpg"], caption=["x"])
    assert [source.stem for source in find_sources(str(tmp_path / "set"))] == ["c"]
    assert [source.stem for source in find_sources(f"{tmp_path}/set/**/[bc].*")] == ["c", "b"]
    assert [source.stem for source in find_sources(f"{tmp_path}/*")] == ["set"]


def test_bad_sources_are_one_clear_line(tmp_path: Path) -> None:
    def fails(data: object, match: str, images: Path | None = None) -> None:
        with pytest.raises(LlavaError, match=match):
            rows_of(data, images)

    write_pictures(tmp_path / "set", ["a.jpg"])
    fails(tmp_path / "set", "no image folder .*nowhere", tmp_path / "nowhere")
    fails(tmp_path / "set", "--images; expected --data of files", tmp_path)
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "nothing to extract in .*empty; expected parquet")
    fails(
        write_json(tmp_path / "a.json", {"a": 1}),
        "a.json is not a JSON list; expected .*; got an object of a",
    )
    fails(write_json(tmp_path / "a.json", [llava("x", "q", "a"), 3]), "a.json, row 1; .* got number")
    fails(
        write_json(tmp_path / "a.json", [{"text": "x"}]),
        "lacks the images; .* got text; name it by --image-column",
    )
    fails(write_json(tmp_path / "a.json", []), "no row in")
    fails(
        write_json(tmp_path / "a.json", [llava("x.jpg", "q", "a")]), "none of the images that .* got 'x.jpg'"
    )
    (tmp_path / "a.json").write_text("[" * 100_000)
    fails(tmp_path / "a.json", "a.json is not JSON")
    (tmp_path / "a.json").write_bytes("[国标]".encode("gbk"))
    fails(tmp_path / "a.json", "a.json is not UTF-8")
    (tmp_path / "b.jsonl").write_text('{"image": "x"}\n{"image": \n')
    fails(tmp_path / "b.jsonl", "b.jsonl, line 2 is not JSON")
    strange = [{"image": "x", "conversations": [{"from": "bot", "value": "a"}]}] * 2
    fails(
        write_json(tmp_path / "a.json", strange), "a.json, row 0: unknown role 'bot'; expected one of human"
    )
    write_json(tmp_path / "two/a.json", [llava("set/a.jpg", "q", "a")])
    (tmp_path / "two/a.jsonl").write_text("")
    fails(tmp_path / "two", r"a.json and .*a.jsonl would both become two-a.h5")
    lists = write_parquet(tmp_path / "c.parquet", image=[[1, 2]], caption=["x"])
    fails(lists, "c.parquet: column 'image' holds no images; .* got list<element: int64>, such as")
    fails(
        write_parquet(tmp_path / "d.parquet", image=["a"], words=["x"]),
        "lacks the words; .* got image, words",
    )


def test_a_question_without_an_answer_is_no_dialogue() -> None:
    assert conversation_turns([{"from": "human", "value": "q"}]) is None


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.json"):
        os.mkfifo(tmp_path / name)
        for data in (tmp_path, tmp_path / name):
            with pytest.raises(LlavaError, match=f"{name} is no regular file"):
                find_sources(str(data))
        (tmp_path / name).unlink()


def test_hosts_of_many_addresses_are_those_of_each() -> None:
    plain = ["http://a.example/1.jpg", "https://A.example:80/x?y#z", "http://a.example", "http://a.example?x"]
    odd = ["http://user:secret@b.example/1", "http:\\\\c.example\\x", " http://d.example/ ", "http://[::1]/x"]
    odd += [
        "http://[",
        "http://e.example:port/",
        "http://例子.example/图.jpg",
        "ftp://f.example/x",
        "",
        "x.jpg",
    ]
    odd += ["http://g\t.example"]
    assert hosts_of([*plain, *odd, *plain]) == [host_of(url) for url in (*plain, *odd, *plain)]
    assert hosts_of(plain)[0] == "a.example"
