"""`extract` from parquet over a real server to shards, and fed badly."""

from __future__ import annotations

import io
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image

from llava_core.row_status import Status
from llava_core.shards.folder import open_shards
from llava_core.shards.reader import Shard
from tests.support.commands import call, run
from tests.support.pictures import asked, features_are_right, good, image, picture, write_parquet
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder


def test_every_row_gets_an_outcome(base: str, vision: Path, tmp_path: Path) -> None:
    urls = [*good(base, 40), f"{base}/gone", f"{base}/page", f"{base}/cut", f"{base}/slow", "nonsense"]
    write_parquet(tmp_path / "data/b.parquet", urls)
    write_parquet(tmp_path / "data/a.parquet", good(base, 30, start=100))
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--vision", vision, "--allow-private",
             "--timeout", 1, "--retries", 0, "--json")  # fmt: skip
    plan = call("extract", "run", *flags, "--dry-run").summary
    assert (plan["rows"], plan["disk_bytes"]) == (75, 75 * 5 * 64 * 2)
    assert call("extract", "run", *flags, "--dry-run", "--thumbnails").summary["disk_bytes"] == 75 * (
        640 + 4096
    )
    assert not (tmp_path / "out").exists()

    ended = run("extract", "run", *flags, "--thumbnails", code=3)
    assert ended.summary["ok"] == 70
    expected = {"ok": 70, "http 4xx": 1, "not an image": 1, "truncated": 1, "timeout": 1, "bad url": 1}
    assert ended.summary["by_status"] == expected
    assert "over --max-failed" in ended.err
    assert "rows/s" not in ended.err  # no bar where there is no terminal
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.h5", "a.json", "b.h5", "b.json"]
    assert json.loads((tmp_path / "out/b.json").read_text())["failed"] == 5

    for shard in open_shards(tmp_path / "out"):
        features_are_right(shard, vision)
        assert [shard.caption(i) for i in range(3)] == ["第0张图", "第1张图", "第2张图"]
    shard = Shard(tmp_path / "out/b.h5")
    assert shard.status[40:].tolist() == [10, 20, 22, 7, 2]
    assert shard.http[40] == 404
    assert tuple(shard.orig_hw[0]) == (60, 80)
    assert shard.thumbnail(40) is None
    thumbnail = Image.open(io.BytesIO(shard.thumbnail(0) or b""))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (32, 24))
    scene = np.asarray(Image.open(io.BytesIO(picture(0))).resize((32, 24)))
    assert np.abs(np.asarray(thumbnail).astype(float) - scene).mean() < 12

    before, requests = (tmp_path / "out/b.h5").read_bytes(), asked.total()
    again = call("extract", "run", *flags, "--max-failed", 0.5)
    assert "nothing to do" in again.err
    assert (asked.total(), (tmp_path / "out/b.h5").read_bytes()) == (requests, before)

    verified = call(
        "extract", "verify", "--out", tmp_path / "out", "--vision", vision, "--allow-private", "--json"
    )
    assert (verified.summary["checked"], verified.summary["encoded_again"]) == (70, 16)
    inspected = call("extract", "inspect", "--out", tmp_path / "out", "--json")
    assert inspected.summary["failed"] == 5


def test_retry_failed_takes_the_chosen_classes_only(vision: Path, tmp_path: Path) -> None:
    healed = False

    async def moody(request: web.Request) -> web.Response:
        return web.Response(body=picture(1)) if healed else web.Response(status=503)

    routes = {
        "/moody.jpg": moody,
        "/moody-2.jpg": moody,
        "/gone": answer(status=404),
        "/no": answer(status=403),
    }
    with serving(routes) as base:
        write_parquet(tmp_path / "data/a.parquet", [f"{base}{path}" for path in routes])
        flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--retries", 0, "--json")
        ended = call("extract", "run", "--data", tmp_path / "data", *flags, code=3)
        assert ended.summary["by_status"] == {"http 5xx": 2, "http 4xx": 2}
        assert ended.summary["by_http"] == {"http 4xx": {"404": 1, "403": 1}, "http 5xx": {"503": 2}}
        assert "  404" in ended.out
        healed = True
        ended = run("extract", "retry-failed", "--status", "http-404", "http-500", *flags, code=3)
        assert ended.summary["by_http"] == {"http 4xx": {"404": 1, "403": 1}, "http 5xx": {"503": 2}}
        ended = call("extract", "retry-failed", "--status", "http-5xx", *flags, code=3)
        assert ended.summary["by_status"] == {"ok": 2, "http 4xx": 2}
        line = call("extract", "retry-failed", "--status", "sunny", *flags, code=2).one_line()
        assert "unknown failure" in line


def test_what_shows_the_same_is_fetched_once_and_encoded_once(vision: Path, tmp_path: Path) -> None:
    """Within a shard, across shards, after a restart, for the same address and for the same bytes."""
    asked.clear()
    routes = {"/{name:\\d+.jpg}": image, "/copy/{name:\\d+.jpg}": image, "/gone": answer(status=404)}
    with serving(routes) as base:
        same = [f"{base}/0.jpg", f"{base}/copy/0.jpg"]
        first = [f"{base}/0.jpg", *good(base, 5), *same, f"{base}/gone", f"{base}/gone", f"{base}/5.jpg"]
        write_parquet(tmp_path / "data/a.parquet", first)
        write_parquet(tmp_path / "data/b.parquet", [*same, f"{base}/copy/4.jpg", *good(base, 3, start=4)])
        flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--max-failed", 1)
        call("extract", "run", "--data", tmp_path / "data", *flags)
        # Copies have paths of their own, so each was asked for once as well.
        assert asked == {"0.jpg": 2, "1.jpg": 1, "2.jpg": 1, "3.jpg": 1, "4.jpg": 2, "5.jpg": 1, "6.jpg": 1}
        a, b = open_shards(tmp_path / "out")
        assert a.status.tolist() == [1] * 8 + [10, 10, 1]
        assert a.http.tolist() == [200] * 8 + [404, 404, 200]
        assert sorted(a.attempts[[0, 1, 6]].tolist()) == [0, 0, 1]  # one of the three was asked for
        for shard in (a, b):
            features_are_right(shard, vision)
        assert a.read(0).tobytes() == a.read(7).tobytes() == b.read(0).tobytes()  # not encoded again

        write_parquet(tmp_path / "data/c.parquet", [f"{base}/copy/6.jpg", f"{base}/6.jpg", f"{base}/7.jpg"])
        before = asked.total()
        call("extract", "run", "--data", tmp_path / "data", *flags)
        assert asked.total() - before == 2
        features_are_right(Shard(tmp_path / "out/c.h5"), vision)
        assert Shard(tmp_path / "out/c.h5").read(1).tobytes() == b.read(5).tobytes()

        write_parquet(tmp_path / "data/d.parquet", [f"{base}/6.jpg"])
        call("extract", "run", "--data", tmp_path / "data", *flags, "--thumbnails")
        assert Shard(tmp_path / "out/d.h5").thumbnail(0)  # which the shards before it have not


def test_cap_seg_in_all_its_forms(base: str, vision: Path, tmp_path: Path) -> None:
    texts = [
        json.dumps({"global_caption": "一个JSON"}),
        repr({"global_caption": "一个'字典'", "x": None}),
        "{'global_caption': ",
        json.dumps({"other": 1}),
        "no dict",
        None,
        json.dumps({"global_caption": "  "}),
    ]
    write_parquet(tmp_path / "data/a.parquet", good(base, len(texts)), texts)
    before = asked.total()
    flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--json")
    ended = call("extract", "run", "--data", tmp_path / "data", *flags, code=3)
    assert ended.summary["by_status"] == {"bad caption": 4, "ok": 3}
    assert asked.total() - before == 3
    shard = Shard(tmp_path / "out/a.h5")
    assert [shard.caption(row) for row in range(5)] == ["一个JSON", "一个'字典'", "", "", "no dict"]


def test_limit_counts_rows_of_all_files(base: str, vision: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_parquet(tmp_path / f"data/{name}.parquet", good(base, 4))
    flags = (
        "--data",
        f"{tmp_path}/data/*.parquet",
        "--vision",
        vision,
        "--out",
        tmp_path / "out",
        "--allow-private",
    )
    call("extract", "run", *flags, "--limit", 6)
    assert [Shard(tmp_path / f"out/{name}.h5").rows for name in "ab"] == [4, 2]
    ended = call("extract", "run", *flags, "--thumbnails", code=1)
    assert "a.h5 was begun without --thumbnails and stays so" in ended.err
    assert "other rows of it" in ended.one_line()


def test_bad_input_is_one_clear_line(base: str, vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--vision", vision, "--out", out)
    missing = call("extract", "run", "--data", tmp_path / "nowhere", *flags, code=1).one_line()
    assert f"no data at {tmp_path}/nowhere" in missing
    (tmp_path / "empty").mkdir()
    assert (
        "nothing to extract in"
        in call("extract", "run", "--data", tmp_path / "empty", *flags, code=1).one_line()
    )

    pq.write_table(pa.table({"link": ["x"], "cap_seg": ["y"]}), tmp_path / "no-url.parquet")
    line = call("extract", "run", "--data", tmp_path / "no-url.parquet", *flags, code=1).one_line()
    assert "lacks the image" in line
    assert "got link, cap_seg" in line
    (tmp_path / "text.parquet").write_text("url,caption")
    assert (
        "text.parquet is no table"
        in call("extract", "run", "--data", tmp_path / "text.parquet", *flags, code=1).one_line()
    )

    write_parquet(tmp_path / "data/a.parquet", good(base, 2))
    bare = write_vision_folder(tmp_path / "bare")
    (bare / "vocab.txt").unlink()
    lacking = call(
        "extract", "run", "--data", tmp_path / "data", "--vision", bare, "--out", out, code=1
    ).one_line()
    assert "lacks vocab.txt" in lacking
    assert not out.exists()

    call("extract", "run", "--data", tmp_path / "data", *flags, "--allow-private")
    other = write_vision_folder(tmp_path / "other", seed=3)
    command = ("extract", "run", "--data", tmp_path / "data", "--out", out)
    assert (
        "holds features of another encoder; expected" in call(*command, "--vision", other, code=1).one_line()
    )
    with h5py.File(out / "a.h5"):  # nothing was lost
        pass
    private = call(*command[:4], "--vision", vision, "--out", tmp_path / "closed", "--json", code=3)
    assert private.summary["by_status"] == {"forbidden address": 2}


def test_usage_errors(vision: Path, tmp_path: Path) -> None:
    flags = ("--data", tmp_path, "--vision", vision, "--out", tmp_path / "out")
    assert "above 0" in call("extract", "run", *flags, "--limit", 0, code=2).one_line()
    (tmp_path / "run.yaml").write_text("concurency: 3\n")
    line = call("extract", "run", "-c", tmp_path / "run.yaml", *flags, code=2).one_line()
    assert "did you mean 'concurrency'?" in line
    call("extract", "run", *flags, "--no-such-flag", code=2)


def test_columns_of_bytes_and_damaged_text(base: str, vision: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    bad = pa.array([b"\xff\xfe caption", "好".encode(), b"[" * 9000]).view(pa.string())
    urls = pa.array([url.encode() for url in good(base, 3)], pa.binary())
    pq.write_table(pa.table({"url": urls, "caption": bad}), tmp_path / "data/a.parquet")
    nested = pa.array(["[" * 100_000, json.dumps({"global_caption": "好"}).encode().decode()])
    pq.write_table(pa.table({"url": good(base, 2), "cap_seg": nested}), tmp_path / "data/b.parquet")
    flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private", "--json")
    ended = call("extract", "run", "--data", tmp_path / "data", *flags, code=3)
    assert ended.summary["by_status"] == {"ok": 4, "bad caption": 1}
    assert Shard(tmp_path / "out/a.h5").caption(1) == "好"
    twice = pa.Table.from_arrays([pa.array(["x"])] * 3, names=["url", "url", "caption"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    line = call("extract", "run", "--data", tmp_path / "twice.parquet", *flags[:4], code=1).one_line()
    assert "more than one column 'url'" in line


def test_a_damaged_file_costs_its_own_rows_only(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 20))
    write_parquet(tmp_path / "data/b.parquet", good(base, 500))
    data = bytearray((tmp_path / "data/b.parquet").read_bytes())
    data[4:400] = bytes(396)  # its pages, not its footer
    (tmp_path / "data/b.parquet").write_bytes(data)
    flags = ("--data", tmp_path / "data", "--vision", vision, "--out", tmp_path / "out", "--allow-private")
    assert "damaged file" in call("extract", "run", *flags, code=1).one_line()
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [Status.OK] * 20
