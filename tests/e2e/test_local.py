"""Data of one's own, from files to shards, and dialogues on to a projector."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from extract.config import RetryConfig, RunConfig, VerifyConfig
from extract.run import retry_failed
from extract.run import run as extract_run
from extract.verify import run as verify
from llava_core.errors import LlavaError
from llava_core.language.instructions import INSTRUCTIONS
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Conversation
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.shards.writer import ShardWriter
from llava_core.vision.open import open_vision_tower
from tests.support.commands import call, run
from tests.support.language_models import write_language_model
from tests.support.local_data import llava, write_json, write_parquet, write_pictures
from tests.support.pictures import picture
from tests.support.servers import answer, serving
from tests.support.shards import reseal
from train.data.samples import Samples

NAMES = ["猫 1.jpg", "b/狗.JPG", "c.jpg"]
CAPTIONS = ["一只猫", "一只狗", "a fish"]


def extracted(vision: Path, data: object, out: Path, **flags: Any) -> Shard:
    figures = extract_run(RunConfig(data=str(data), out=out, vision=vision, device="cpu", **flags))
    assert figures["rows"]
    assert figures["bottleneck"] != "download"
    (path,) = out.glob("*.h5")
    return Shard(path)


def test_four_forms_give_the_same_features(vision: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", NAMES)
    for name, caption in zip(NAMES, CAPTIONS, strict=True):
        (tmp_path / "set" / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    structs = [{"bytes": content, "path": name} for content, name in zip(pictures, NAMES, strict=True)]
    dialogues = [llava(name, "<image>", text) for name, text in zip(NAMES, CAPTIONS, strict=True)]
    forms = {
        "paths": write_parquet(tmp_path / "set/paths.parquet", image=NAMES, caption=CAPTIONS),
        "bytes": write_parquet(tmp_path / "bytes.parquet", image=structs, caption=CAPTIONS),
        "json": write_json(tmp_path / "llava.json", dialogues),
        "folder": tmp_path / "set",
    }
    tower = open_vision_tower(vision)
    expected = {
        name: tower.encode(tower.preprocess.decode_image(content).pixels[None])[0].numpy()
        for name, content in zip(NAMES, pictures, strict=True)
    }
    for form, data in forms.items():
        if form == "folder":
            forms["paths"].unlink()
        flags: dict[str, Any] = {"images": tmp_path / "set"} if form == "json" else {}
        shard = extracted(vision, data, tmp_path / f"out-{form}", **flags)
        assert shard.status.tolist() == [Status.OK] * 3
        assert [shard.url(row) for row in range(3)] == (sorted(NAMES) if form == "folder" else NAMES)
        for row in range(3):
            name = shard.url(row)
            np.testing.assert_allclose(shard.read(row), expected[name], rtol=2e-3, atol=2e-3)
            turns = shard.turns(row)
            assert turns == ((None, CAPTIONS[NAMES.index(name)]),)
            assert shard.http[row] == shard.attempts[row] == 0
            assert tuple(shard.orig_hw[row]) == (60, 80)
        assert shard.local
        assert shard.conversations == (form == "json")
        with h5py.File(shard.path) as file:
            assert file.attrs["images"] == "local"
            assert file.attrs["text"] == ("conversation" if form == "json" else "caption")


def test_rows_in_files_that_fail_are_tried_again_with_their_data(
    vision: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [*NAMES, "missing.jpg", "text.jpg", "cut.jpg", "../outside.jpg"]
    write_pictures(tmp_path / "images", NAMES)
    write_pictures(tmp_path, ["outside.jpg"])
    (tmp_path / "images/text.jpg").write_text("no image")
    (tmp_path / "images/cut.jpg").write_bytes(picture(9)[:700])
    with serving({"/far.jpg": answer(picture(8))}) as base:
        rows = [llava(name, "<image>\nq", f"answer of {name}") for name in [*names, f"{base}/far.jpg"]]
        rows.append({"image": NAMES[0], "conversations": []})
        data = write_json(tmp_path / "data/own.json", rows)
        flags = ("--vision", vision, "--out", tmp_path / "out", "--allow-private")
        local = ("--data", data, "--images", tmp_path / "images")
        ended = call("extract", "run", *flags, *local, "--json", code=3)
        assert ended.summary["by_status"] == {
            "ok": 4, "no file": 1, "not an image": 1, "truncated": 1, "outside folder": 1, "bad caption": 1,
        }  # fmt: skip
        assert ended.summary["failed_hosts"] == {}
        path = tmp_path / "out/own.h5"
        assert Shard(path).status.tolist() == [1, 1, 1, 15, 20, 22, 16, 1, 30]

        write_pictures(tmp_path / "images", ["missing.jpg"])
        statistics = path.with_suffix(".json").rename(tmp_path / "statistics.json")
        line = call("extract", "retry-failed", *flags, code=1).one_line()
        assert f"{path} was made from local images; give --data as to `extract run`" in line
        statistics.rename(path.with_suffix(".json"))
        ended = call("extract", "retry-failed", *flags, "--json", code=3)
        assert ended.summary["ok"] == 5
        assert Shard(path).status[3] == Status.OK
        assert Shard(path).turns(3) == (("q", "answer of missing.jpg"),)

        config = VerifyConfig(out=tmp_path / "out", vision=vision, allow_private=True)
        assert verify(config)["encoded_again"] == 5
        path.with_suffix(".json").unlink()
        figures = verify(config)
        assert "1 shards of local images are not encoded again; give --data" in capfd.readouterr().err
        assert (figures["checked"], figures["encoded_again"]) == (5, 0)
        known = dataclasses.replace(config, data=str(data), images=tmp_path / "images")
        assert verify(known)["encoded_again"] == 5

    write_json(data, rows[:3])
    changed = RetryConfig(out=tmp_path / "out", vision=vision, data=str(data), images=tmp_path / "images")
    with pytest.raises(LlavaError, match=r"own.json has changed since .*own.h5 was made from it"):
        retry_failed(changed)
    with pytest.raises(LlavaError, match=r"own.h5 was made from own.json, which is not in .*images"):
        retry_failed(RetryConfig(out=tmp_path / "out", vision=vision, data=str(tmp_path / "images")))


def test_an_image_replaced_under_its_name_is_encoded_again(vision: Path, tmp_path: Path) -> None:
    """By its size and mtime, then by its bytes; one that was only touched keeps its features."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n, name in enumerate(names := ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]):
        (folder / name).write_bytes(b"<html>" if name == "f.jpg" else picture(n))
        (folder / name).with_suffix(".txt").write_text(f"picture {n}")
    command = (
        "extract",
        "run",
        "--data",
        folder,
        "--vision",
        vision,
        "--out",
        tmp_path / "out",
        "--max-failed",
        1,
    )
    call(*command)
    path = tmp_path / "out/set.h5"
    before = Shard(path)
    features = [before.read(row).tobytes() for row in range(5)]
    assert before.mtime.tolist() == [(folder / name).stat().st_mtime_ns for name in names]

    (folder / "new.tmp").write_bytes(picture(77))
    os.utime(folder / "new.tmp", ns=(0, 1))
    (folder / "new.tmp").replace(folder / "a.jpg")  # an older picture, moved over the name
    (folder / "b.jpg").write_bytes(picture(78) + b"longer")
    os.utime(folder / "b.jpg", ns=(0, int(before.mtime[1])))
    os.utime(folder / "c.jpg")
    (folder / "f.jpg").write_bytes(picture(79))
    ended = call(*command)
    assert f"{path}: 3 images changed since encoded, such as a.jpg; encoding again" in ended.err
    after = Shard(path)
    hashes = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    assert hashes == [stored.tobytes() for stored in after.sha256]
    assert after.ok_rows() == [*range(6)]
    assert all(after.check(row) for row in range(6))
    assert [after.read(row).tobytes() == features[row] for row in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]

    (folder / "d.jpg").write_bytes(b"")
    assert "1 image changed" in call(*command).err
    assert Shard(path).ok_rows() == [0, 1, 2, 4, 5]
    assert "changed" not in call(*command).err


def test_an_image_replaced_before_its_shard_is_finished_is_encoded_again(
    vision: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "set", tmp_path / "out"
    write_pictures(folder, names := ["a.jpg", "b.jpg", "c.jpg"])
    for name in names:
        (folder / name).with_suffix(".txt").write_text("a picture")
    command = ("extract", "run", "--data", folder, "--vision", vision, "--out", out)
    call(*command)
    path = out / "set.h5"
    with ShardWriter(path, retry=np.array([False, False, True])):
        pass  # killed before its last row
    path.unlink()
    (folder / "a.jpg").write_bytes(picture(77))
    (folder / "b.jpg").touch()
    ended = call(*command)
    assert f"{path}: 1 image changed since encoded, such as a.jpg; encoding again" in ended.err
    hashes = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    shard = Shard(path)
    assert [stored.tobytes() for stored in shard.sha256] == hashes
    assert all(shard.check(row) for row in range(3))


def test_images_that_are_gone_keep_their_features(vision: Path, tmp_path: Path) -> None:
    """As when a data set is deleted once it is encoded: the parquet file names them still."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture(1))
    pq.write_table(pa.table({"path": ["a.jpg", "a.jpg"], "caption": ["x", "y"]}), tmp_path / "a.parquet")
    folders = ("--images", tmp_path / "images", "--out", tmp_path / "out")
    command = ("extract", "run", "--data", tmp_path / "a.parquet", "--vision", vision, *folders)
    call(*command)
    shard = Shard(tmp_path / "out/a.h5")
    assert shard.mtime[0] == shard.mtime[1] > 0  # the second was read as well, though not encoded
    (tmp_path / "images/a.jpg").unlink()
    assert "nothing to do" in call(*command).err


def test_bytes_in_parquet_are_tried_again_and_verified(vision: Path, tmp_path: Path) -> None:
    contents = [picture(row) for row in range(9)]
    contents[4] = b"no image"
    data = write_parquet(tmp_path / "own.parquet", image=contents, caption=["x"] * 9)
    shard = extracted(vision, data, tmp_path / "out", limit=8)
    assert shard.status.tolist() == [1, 1, 1, 1, 20, 1, 1, 1]
    figures = retry_failed(RetryConfig(out=tmp_path / "out", vision=vision, data=str(data)))
    assert figures["by_status"] == {"ok": 7, "not an image": 1}
    config = VerifyConfig(out=tmp_path / "out", vision=vision, data=str(data))
    assert verify(config)["encoded_again"] == 7


def test_data_is_never_overwritten(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    data = write_json(tmp_path / "own.json", [llava("a.jpg", "q", "a")])
    before = data.read_text()
    with pytest.raises(LlavaError, match=r"would overwrite .*own.json; choose another --out"):
        extracted(vision, data, tmp_path)
    assert data.read_text() == before


def test_dialogues_are_trained_on_whole(vision: Path, tmp_path: Path) -> None:
    """Every answer of every turn, and its end token, is learnt; what follows a cut answer is not."""
    names = [f"{i}.jpg" for i in range(6)]
    write_pictures(tmp_path / "data", names)
    third = ("how many?", "3")
    rows = [
        llava(name, "<image>\nwhat?", f"图{i}", "colour?", "red", *(third if i % 2 else ()))
        for i, name in enumerate(names)
    ]
    rows[4] = llava("4.jpg", "what?", "far too long an answer", "colour?", "red", "?", "no")
    rows[5] = llava("5.jpg", "<image>", "drawn")
    write_json(tmp_path / "data/talk.json", rows)
    extracted(vision, tmp_path / "data", tmp_path / "features")
    llm = write_language_model(tmp_path / "llm")

    flags = ("--features", tmp_path / "features", "--llm", llm, "--max-text-tokens", 8)
    run_flags = ("--eval-features", tmp_path / "features", "--out", tmp_path / "run", "--batch-size", 3)
    ended = call("train", "run", *flags, *run_flags, "--json")
    assert [ended.summary[key] for key in ("steps", "captions_cut", "turns_dropped")] == [2, 1, 2]
    assert "1 captions were cut at 8 tokens, and 2 turns after them dropped" in ended.err

    learnt = 0  # one token a byte, and one for the end of each answer that has one
    for i in range(4):
        learnt += len(f"图{i}".encode()) + 1 + len("red") + 1 + (len("3") + 1) * (i % 2)
    learnt += 8 + len("drawn") + 1
    checkpoint = ("--checkpoint", tmp_path / "run/last")
    assert run("train", "eval", *flags, *checkpoint, "--json").summary["answer_tokens"] == learnt

    model = load_language_model(llm)
    chat = Conversation(model.tokenizer, model.eos_ids)
    samples = Samples([Shard(tmp_path / "features/talk.h5")], chat, max_text_tokens=8, limit=9, seed=0)
    seen = model.tokenizer.decode(samples.example(1, epoch=0).ids)
    assert seen == (
        "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n图1<|im_end|>\n"
        "<|im_start|>user\ncolour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n3<|im_end|>"
    )
    drawn = {model.tokenizer.decode(samples.example(5, epoch).ids) for epoch in range(40)}
    assert {text.split("\n")[1].removesuffix("<|im_end|>") for text in drawn} <= set(INSTRUCTIONS)
    assert len(drawn) > 3


def test_a_damaged_dialogue_is_named(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, ["a.jpg"])
    write_json(tmp_path / "own.json", [llava("a.jpg", "question", "answer")])
    shard = extracted(vision, tmp_path / "own.json", tmp_path / "out")
    with shard.path.open("r+b") as file:
        file.seek(shard.layout.offsets["caption_bytes"])
        assert file.read(4) == b'[["q'
        file.seek(-2, os.SEEK_CUR)
        file.write(b"7")
    with pytest.raises(LlavaError, match=r"damaged shard .*own.h5; got other texts"):
        verify(VerifyConfig(out=tmp_path / "out"))
    reseal(shard.path)
    with pytest.raises(LlavaError, match=r"damaged shard .*own.h5; got dialogue of row 0"):
        verify(VerifyConfig(out=tmp_path / "out"))
