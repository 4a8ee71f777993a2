"""`extract run --keep-images`: tars from which a later encoder makes the cache that it would have made."""

from __future__ import annotations

import json
import random
import tarfile
import time
from pathlib import Path

import pytest

from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.tables.words import SAMPLE
from tests.support.caches import flags_of, same_shards
from tests.support.commands import call, fill, holder, started, wait_until
from tests.support.pictures import asked, good, picture, write_parquet


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def test_a_later_encoder_makes_the_same_cache_without_the_network(
    base: str, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    urls = [*good(base, 4), f"{base}/gone", f"{base}/cut", f"{base}/2.jpg", f"{base}/02.jpg", f"{base}/page"]
    write_parquet(tmp_path / "data/a.parquet", urls, [f"图 {row}" if row != 3 else None for row in range(9)])
    write_parquet(tmp_path / "data/b.parquet", good(base, 3, start=4))
    flags, (clip, dinov2) = flags_of(tmp_path / "data"), encoders
    first = ("extract", "run", *flags, "--vision", clip, "--out", tmp_path / "clip")
    before = asked.copy()
    told = call(*first, "--keep-images", tmp_path / "kept").err
    assert max(asked[str(row)] - before[str(row)] for row in range(7)) == 1
    assert f"{tmp_path / 'kept/a.tar'}: 6 images of 9 rows" in told
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "a.tar", "a_stats.json", "b.tar", "b_stats.json"
    ]  # fmt: skip
    kept = members(tmp_path / "kept/a.tar")
    assert [*kept][:8] == [f"00000{row}.{kind}" for row in (0, 1) for kind in ("jpg", "txt", "json")] + [
        "000002.jpg", "000002.txt"
    ]  # fmt: skip
    assert kept["000006.jpg"] == kept["000007.jpg"] == picture(2)
    assert kept["000000.txt"].decode() == "图 0"
    assert json.loads(kept["000004.json"])["status"] == "http 4xx"
    assert json.loads(kept["000001.json"])["url"] == urls[1]
    assert "000003.txt" not in kept

    before = asked.copy()
    later = ("extract", "run", *flags_of(tmp_path / "kept"), "--vision", dinov2)
    call(*later, "--out", tmp_path / "later")
    assert asked == before
    call("extract", "run", *flags, "--vision", dinov2, "--out", tmp_path / "network")
    for shard in ("a.h5", "b.h5"):
        same_shards(tmp_path / "later" / shard, tmp_path / "network" / shard)

    before = asked.copy()
    assert "nothing to do" in call(*first, "--keep-images", tmp_path / "kept").err
    assert asked == before
    (tmp_path / "kept/b.tar").unlink()  # of a finished cache its images alone are asked for
    assert "the images of 1 source are to be kept" in call(*first, "--keep-images", tmp_path / "kept").err
    assert (asked - before).total() == 3
    assert members(tmp_path / "kept/b.tar")["000002.jpg"] == picture(6)


def test_caches_from_the_network_and_from_the_tars_fuse(
    base: str, encoders: tuple[Path, Path], world: Path, tmp_path: Path
) -> None:
    """Row by row they are of the same files, under other ids and addresses."""
    write_parquet(tmp_path / "data/a.parquet", good(base, 6))
    keep = ("--keep-images", tmp_path / "kept")
    clip, dinov2 = encoders
    flags = flags_of(tmp_path / "data")
    call("extract", "run", *flags, "--vision", clip, "--out", tmp_path / "clip", *keep)
    later = ("--vision", dinov2, "--out", tmp_path / "dinov2")
    call("extract", "run", *flags_of(tmp_path / "kept"), *later)
    caches = ("--features", tmp_path / "clip", tmp_path / "dinov2", "--fuse", "tokens")
    train = ("train", "run", *caches, "--llm", world / "llm", "--eval-samples", 2, "--max-steps", 1)
    call(*train, "--batch-size", 2, "--eval-every", 1, "--device", "cpu", "--out", tmp_path / "run")


def test_dialogues_come_back_as_they_were(vision: Path, tmp_path: Path) -> None:
    """With a system message, an empty question, several captions, text alone and several images."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.jpg").write_bytes(picture(1))
    dialogues = [
        [("system", "短"), ("human", "<image>\n这是？"), ("gpt", "猫"), ("human", "颜色？"), ("gpt", "黑")],
        [("human", "<image>"), ("gpt", "猫")],
        [("human", "你好"), ("gpt", "你好！")],
        [("human", "<image>"), ("gpt", "猫"), ("human", "还有吗？"), ("gpt", "没有")],
    ]  # fmt: skip
    rows = [
        {"id": str(n), "conversations": [{"from": who, "value": text} for who, text in dialogue]}
        | ({"image": "1.jpg"} if n != 2 else {})
        for n, dialogue in enumerate(dialogues)
    ]
    (tmp_path / "data/chat.json").write_text(json.dumps(rows, ensure_ascii=False))
    first = ("--data", tmp_path / "data/chat.json", "--keep-images", tmp_path / "kept")
    call("extract", "run", *first, "--vision", vision, "--out", tmp_path / "one")
    call("extract", "run", "--data", tmp_path / "kept", "--vision", vision, "--out", tmp_path / "two")
    assert Shard(tmp_path / "one/chat.h5").status.tolist() == [1, 1, Status.TEXT_ONLY, 1]
    same_shards(tmp_path / "one/chat.h5", tmp_path / "two/chat.h5")


def test_words_come_back_as_they_were(base: str, vision: Path, tmp_path: Path) -> None:
    """Like JSON, what UTF-8 cannot hold, beside no image at all, and after many rows without any."""
    looks = ['["a","b"]', '{"caption":"x"}', "[1]", '"quoted"', "null", "{broken", "😀", " a\n b "]
    write_parquet(tmp_path / "data/a.parquet", good(base, len(looks)), [{"words": text} for text in looks])
    write_parquet(tmp_path / "data/b.parquet", [f"{base}/gone"] * 3, [{"words": "x"}] * 3)
    late = [*[None] * SAMPLE, {"words": "at last"}]
    write_parquet(tmp_path / "data/c.parquet", good(base, SAMPLE + 1), late)
    rows = [{"id": "\ud800", "image": f"{base}/1.jpg", "caption": {"words": "a \ud83d cat"}}]
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/d.json").write_text(json.dumps(rows))
    key = ("--caption-key", "words", "--vision", vision)
    for data in ("data", "lone"):
        first = ("extract", "run", *flags_of(tmp_path / data), *key, "--keep-images", tmp_path / "kept")
        call(*first, "--out", tmp_path / "one")
    for flags in (key, key[2:]):
        out = tmp_path / f"two{len(flags)}"
        call("extract", "run", *flags_of(tmp_path / "kept"), *flags, "--out", out)
        for name in "abcd":
            same_shards(tmp_path / f"one/{name}.h5", out / f"{name}.h5")
    call("extract", "retry-failed", "--out", out, "--vision", vision, "--max-failed", 1)
    assert Shard(out / "b.h5").status.tolist() == [Status.HTTP_4XX] * 3
    tar = tmp_path / "kept/a.tar"
    tar.write_bytes(
        tar.read_bytes().replace(picture(2), picture(2)[:-20] + bytes(20))
    )  # decodes all the same
    call("extract", "run", *flags_of(tar), "--vision", vision, "--out", tmp_path / "damaged")
    damaged = Shard(tmp_path / "damaged/a.h5")
    assert damaged.status.tolist() == [1, 1, Status.UNREADABLE_FILE, 1, 1, 1, 1, 1]
    assert damaged.reason_of(2) == "damaged: another sha256 than noted"


@pytest.mark.parametrize(("kills", "rows"), [(3, 60), pytest.param(40, 600, marks=pytest.mark.slow)])
def test_killed_at_any_moment_every_image_is_kept_once(
    base: str, vision: Path, tmp_path: Path, kills: int, rows: int
) -> None:
    for part in "ab":
        urls = [*good(base, rows, start=ord(part)), f"{base}/gone", f"{base}/{ord(part)}.jpg"]
        write_parquet(tmp_path / f"data/{part}.parquet", urls)
    rng, kept = random.Random(0), tmp_path / "kept"
    flags = ("extract", "run", *flags_of(tmp_path / "data"), "--vision", vision, "--concurrency", 4)
    command = (*flags, "--out", tmp_path / "out", "--keep-images", kept)
    for _ in range(kills):
        with started(*command) as process:
            wait_until(
                process,
                lambda: process.poll() is not None or any(map(_is_of(process.pid), kept.glob("*.lock"))),
            )
            time.sleep(rng.uniform(0, 0.5))
    call(*command)
    call(*flags, "--out", tmp_path / "out", "--keep-images", tmp_path / "undisturbed")
    for part in "ab":
        assert (kept / f"{part}.tar").read_bytes() == (tmp_path / f"undisturbed/{part}.tar").read_bytes()
        assert Shard(tmp_path / f"out/{part}.h5").status.tolist() == [Status.OK] * rows + [10, Status.OK]
    assert sorted(path.name for path in kept.iterdir()) == ["a.tar", "a_stats.json", "b.tar", "b_stats.json"]


def _is_of(pid: int):  # type: ignore[no-untyped-def]
    return lambda lock: holder(lock) == pid


def test_a_full_disk_of_the_tar_costs_the_cache_nothing(
    base: str, vision: Path, small_disk: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 120))
    keep = ("--keep-images", small_disk, "--concurrency", 4)
    command = ("extract", "run", *flags_of(tmp_path / "data"), "--vision", vision, "--out", tmp_path / "out")
    with started(*command, *keep) as process:
        wait_until(process, (small_disk / "a.tar.part").exists)
        filler = fill(small_disk)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith("error: No space left on device")
    assert "Traceback" not in err
    filler.write_bytes(bytes(400_000))  # enough for the files, but not for the tar beside them
    line = call(*command, *keep, code=1).one_line()
    assert line.startswith(f"error: not enough disk space for {small_disk / 'a.tar'}; expected")
    filler.unlink()
    call(*command, *keep)
    assert Shard(tmp_path / "out/a.h5").status.tolist() == [Status.OK] * 120
    assert sum(name.endswith(".jpg") for name in members(small_disk / "a.tar")) == 120


def test_what_a_crash_damaged_in_a_part_is_downloaded_again(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 5))
    flags = ("extract", "run", *flags_of(tmp_path / "data"), "--vision", vision, "--out", tmp_path / "out")
    call(*flags, "--keep-images", tmp_path / "right")
    right, kept = (tmp_path / "right/a.tar").read_bytes(), tmp_path / "kept"
    command = (*flags, "--keep-images", kept)
    with started(*command, "--host-rate", 1) as process:
        part = kept / "a.tar.part"
        wait_until(process, lambda: part.exists() and part.stat().st_size > 5000)
    for cut in (len(part.read_bytes()) - 700, 100, 0):
        part.write_bytes(part.read_bytes()[:cut] + bytes(900))
        with started(*command, "--host-rate", 1) as process:
            wait_until(process, lambda: any(map(_is_of(process.pid), kept.glob("*.lock"))))
    call(*command)
    assert (kept / "a.tar").read_bytes() == right


def test_what_cannot_be_is_one_line(base: str, vision: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 2))
    write_parquet(tmp_path / "other/a.parquet", good(base, 3))
    (tmp_path / "file").touch()
    kept = tmp_path / "kept"

    def refused(data: str, keep: Path, *flags: object, code: int) -> str:
        run = ("extract", "run", *flags_of(tmp_path / data), "--vision", vision, *flags)
        return call(*run, "--out", tmp_path / f"out-{data}", "--keep-images", keep, code=code).one_line()

    assert "--keep-images; expected a folder" in refused("data", tmp_path / "file", code=2)
    assert "--ray; expected one encoder, one layer, and no --keep-images" in refused(
        "data", kept, "--ray", "auto", code=2
    )
    flags = flags_of(tmp_path / "data")
    call("extract", "run", *flags, "--vision", vision, "--out", tmp_path / "out", "--keep-images", kept)
    line = refused("other", kept, code=1)
    assert f"{kept / 'a.tar'} was made from another file; expected a.parquet of 3 rows" in line
    for inside in (tmp_path / "data", tmp_path / "data/kept"):  # where the tars would be data the next time
        assert "--keep-images; expected a folder outside --data" in refused("data", inside, code=2)
    plan = call("extract", "run", *flags, "--vision", vision, "--out", tmp_path / "no", "--dry-run")
    assert "--keep-images" not in plan.err
    plan = call("extract", "run", *flags, "--vision", vision, "--out", tmp_path / "no", "--dry-run",
                "--keep-images", kept)  # fmt: skip
    assert "the image files that --keep-images keeps come on top" in plan.err
