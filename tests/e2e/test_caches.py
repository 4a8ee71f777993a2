"""Several encoders and layers from one download: each cache is the same as one that is made alone."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from extract.stages.decode import Decode
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.vision.preprocess import Preprocess
from llava_core.vision.tower import VisionTower, encode_layers
from tests.support.caches import flags_of, same_shards
from tests.support.commands import call, fill, holder, started, wait_until
from tests.support.pictures import asked, good, write_parquet
from tests.support.vision_encoders import write_vision_folder

LAYERS = ("--layers", "last", "-2", "1")
NAMES = ["clip", "clip@-2", "clip@1", "dinov2", "dinov2@-2", "dinov2@1"]


def test_each_cache_is_the_same_as_one_made_alone(
    base: str, encoders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows that fail, have no words, or show the same as another; and each thing is done once."""
    urls = [*good(base, 9), f"{base}/gone", f"{base}/cut", f"{base}/2.jpg", f"{base}/02.jpg"]
    write_parquet(tmp_path / "data/a.parquet", urls, [f"图 {row}" if row != 7 else None for row in range(13)])
    write_parquet(tmp_path / "data/b.parquet", good(base, 6, start=5))
    flags = flags_of(tmp_path / "data")
    passes: list[int] = []
    decoded: list[Preprocess] = []
    pixels_of = Decode._pixels

    def counted(towers: list[VisionTower], pixels: torch.Tensor) -> list[torch.Tensor]:
        passes.append(len(towers))
        return encode_layers(towers, pixels)

    def counted_too(stage: Decode, body: bytes, preprocess: Preprocess) -> Any:
        decoded.append(preprocess)
        return pixels_of(stage, body, preprocess)

    monkeypatch.setattr("extract.stages.encode.encode_layers", counted)
    monkeypatch.setattr(Decode, "_pixels", counted_too)
    before = asked.copy()
    ended = call(
        "extract", "run", *flags, "--vision", *encoders, *LAYERS, "--out", tmp_path / "all", "--json"
    )
    assert {name: n - before[name] for name, n in asked.items() if n != before[name]} == {
        **{f"{n}": 1 for n in range(11)}, "02": 1
    }  # fmt: skip
    assert passes == [3] * 2 * 11  # eleven pictures, by each encoder once for three layers; 7 is in b alone
    assert len(decoded) == 2 * 12  # and the one that cannot be
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(NAMES)
    assert list(ended.summary["caches"]) == NAMES
    monkeypatch.undo()
    for name in NAMES:
        encoder, _, layer = name.partition("@")
        alone = (*flags, "--vision", encoders[0].parent / encoder, "--out", tmp_path / "alone" / name)
        figures = call("extract", "run", *alone, *(["--layer", layer] if layer else []), "--json").summary
        told = ended.summary["caches"][name]
        assert {key: told[key] for key in ("rows", "ok", "by_status")} == {
            key: figures[key] for key in ("rows", "ok", "by_status")
        }
        for shard in ("a.h5", "b.h5"):
            same_shards(tmp_path / "all" / name / shard, tmp_path / "alone" / name / shard)


@pytest.mark.parametrize(("kills", "rows"), [(4, 60), pytest.param(40, 600, marks=pytest.mark.slow)])
def test_caches_killed_at_any_moment_have_every_row_exactly_once(
    base: str, encoders: tuple[Path, Path], tmp_path: Path, kills: int, rows: int
) -> None:
    for part in range(3):
        write_parquet(tmp_path / f"data/{part}.parquet", good(base, rows, start=rows * part))
    out, rng, killed = tmp_path / "killed", random.Random(0), 0
    flags = (
        *flags_of(tmp_path / "data"),
        "--concurrency",
        8,
        "--vision",
        *encoders,
        "--layers",
        "last",
        "-2",
    )
    command = ("extract", "run", *flags, "--out", out)
    while killed < kills:
        with started(*command) as process:
            wait_until(
                process,
                lambda: (
                    process.poll() is not None
                    or any(holder(lock) == process.pid for lock in out.glob("*/*.lock"))
                ),
            )
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is not None:
                break
        killed += 1
    assert killed
    call(*command)
    call("extract", "run", *flags, "--out", tmp_path / "undisturbed")
    for name in ("clip", "clip@-2", "dinov2", "dinov2@-2"):
        assert sorted(path.name for path in (out / name).glob("*.h5*")) == ["0.h5", "1.h5", "2.h5"]
        for part in range(3):
            assert Shard(out / name / f"{part}.h5").status.tolist() == [Status.OK] * rows
            same_shards(out / name / f"{part}.h5", tmp_path / "undisturbed" / name / f"{part}.h5")


def test_what_is_missing_is_made(base: str, encoders: tuple[Path, Path], tmp_path: Path) -> None:
    """A deleted shard, and another layer later on, which downloads again."""
    for part in "ab":
        write_parquet(tmp_path / f"data/{part}.parquet", good(base, 5))
    command = (
        "extract",
        "run",
        *flags_of(tmp_path / "data"),
        "--out",
        tmp_path / "out",
        "--vision",
        *encoders,
    )
    assert "0 shards are finished, 4 to go" in call(*command).err
    (tmp_path / "out/dinov2/b.h5").unlink()
    before = asked.total()
    assert "3 shards are finished, 1 to go" in call(*command).err
    assert asked.total() == before  # its pictures are in a.h5 of the same cache
    assert "nothing to do" in call(*command).err
    assert "4 shards are finished, 4 to go" in call(*command, "--layers", "last", "0").err
    assert asked.total() == before + 5


def test_a_full_disk_of_one_cache_costs_the_others_nothing(
    base: str, encoders: tuple[Path, Path], small_disk: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 150))
    out = tmp_path / "out"
    out.mkdir()
    (out / "clip@1").symlink_to(small_disk)
    flags = (*flags_of(tmp_path / "data"), "--vision", encoders[0], "--layers", "last", "1", "--out", out)
    with started("extract", "run", *flags, "--concurrency", 4) as process:
        wait_until(process, (small_disk / "a.h5.journal").exists)
        filler = fill(small_disk)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err.splitlines()[-1].startswith("error: No space left on device")
    assert "Traceback" not in err
    filler.unlink()
    call("extract", "run", *flags)
    for name in ("clip", "clip@1"):
        assert Shard(out / name / "a.h5").status.tolist() == [Status.OK] * 150


def test_rows_that_another_cache_has_are_not_downloaded(
    base: str, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    """By address, and by the picture's sha256 where the address is another one."""
    write_parquet(tmp_path / "old.parquet", good(base, 8, start=40))
    write_parquet(tmp_path / "new.parquet", [*good(base, 12, start=40), f"{base}/041.jpg"])
    old = (
        "extract",
        "run",
        *flags_of(tmp_path / "old.parquet"),
        "--vision",
        *encoders,
        "--out",
        tmp_path / "old",
    )
    new = ("extract", "run", *flags_of(tmp_path / "new.parquet"), "--vision", *encoders)
    call(*old)
    before = asked.copy()
    reuse = ("--reuse", tmp_path / "old/clip", tmp_path / "old/dinov2")
    err = call(*new, "--out", tmp_path / "new", *reuse).err
    assert {name for name, n in asked.items() if n != before[name]} == {
        "48", "49", "50", "51", "041"
    }  # fmt: skip
    assert "18 rows copied from --reuse" in err  # nine of each cache
    one = (
        "--out",
        tmp_path / "one",
        "--reuse",
        tmp_path / "old/clip/old.h5",
    )  # a shard instead of its folder
    assert "9 rows copied from --reuse" in call(*new[:-1], *one).err
    call(*new, "--out", tmp_path / "alone")
    for name in ("clip", "dinov2"):
        same_shards(tmp_path / "new" / name / "new.h5", tmp_path / "alone" / name / "new.h5")

    def refused(*more: object, code: int = 1) -> str:
        flags = (*flags_of(tmp_path / "new.parquet"), "--out", tmp_path / "refused", *more)
        return call("extract", "run", *flags, code=code).one_line()

    line = refused("--vision", encoders[0], "--reuse", tmp_path / "old/dinov2")
    assert line.startswith("error: --reuse: the features in")
    assert "expected clip" in line
    line = refused("--vision", encoders[0], "--reuse", tmp_path / "old/clip", "--dtype", "int8")
    assert "expected int8; got float16; leave it out" in line
    assert not (tmp_path / "refused").exists()


def test_layer_is_that_of_each_of_several_encoders(
    base: str, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    write_parquet(tmp_path / "a.parquet", good(base, 2))
    run = ("extract", "run", *flags_of(tmp_path / "a.parquet"), "--vision", *encoders, "--layer", -2)
    planned = call(*run, "--out", tmp_path / "out", "--dry-run")
    assert "clip@-2:" in planned.out.splitlines()
    assert "dinov2@-2:" in planned.out.splitlines()
    assert "2 caches take" in planned.err
    assert not (tmp_path / "out").exists()
    call(*run, "--out", tmp_path / "out")
    assert Shard(tmp_path / "out/clip@-2/a.h5").encoder["layer"] == 3
    assert Shard(tmp_path / "out/dinov2@-2/a.h5").encoder["layer"] == 2
    one = ("--vision", encoders[0], "--layer", -2, "--reuse", tmp_path / "out/clip@-2/a.h5")
    ended = call("extract", "run", *flags_of(tmp_path / "a.parquet"), *one, "--out", tmp_path / "one")
    assert "2 rows copied from --reuse" in ended.err  # counted of a shard, too


def test_what_cannot_be_is_one_line(base: str, encoders: tuple[Path, Path], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", good(base, 2))
    clip, dinov2 = encoders
    shallow = write_vision_folder(tmp_path / "shallow/clip")
    before = asked.total()
    for flags, words in {
        ("--vision", clip, dinov2, "--layers", "last", "4"): "dinov2 has no layer 4; expected -4 to 3",
        ("--vision", clip, shallow): "would make",
        ("--vision", clip, "--layers", "last", "last"): "would make",
        ("--vision", clip, "--layers", "-2", "3"): "clip@-2 and clip@3 are the same features",
        ("--vision", clip, "--layers", "1", "--layer", "1"): "--layer and --layers",
        ("--vision", clip, dinov2, "--ray", "auto"): "--ray",
    }.items():
        out = ("--out", tmp_path / "out", "--allow-private")
        line = call("extract", "run", "--data", tmp_path / "a.parquet", *flags, *out, code=2).one_line()
        assert words in line, line
    assert asked.total() == before
    assert not (tmp_path / "out").exists()


def test_an_encoder_out_of_memory_costs_the_others_nothing(
    base: str, encoders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "data/a.parquet", good(base, 40))
    flags = (*flags_of(tmp_path / "data"), "--vision", *encoders, "--out", tmp_path / "out")
    passes: list[str] = []

    def torn(towers: list[VisionTower], pixels: torch.Tensor) -> list[torch.Tensor]:
        passes.append(towers[0].name)  # by the one thread that encodes
        if passes[-1] == "dinov2" and passes.count("dinov2") == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return encode_layers(towers, pixels)

    monkeypatch.setattr("extract.stages.encode.encode_layers", torn)
    line = call("extract", "run", *flags, code=1).one_line()
    assert "the memory is full" in line
    assert "dinov2" in line
    call("extract", "run", *flags)  # the tenth pass of dinov2 and later ones are well
    assert passes.count("dinov2") == 41
    assert passes.count("clip") in (40, 41)  # one may have been under way
    for name in ("clip", "dinov2"):
        assert Shard(tmp_path / "out" / name / "a.h5").status.tolist() == [Status.OK] * 40
