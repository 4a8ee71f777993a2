"""What `train run` does in a folder that holds something already, and from where it starts."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import h5py
import pytest
import xxhash

from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.shards.reader import Shard
from tests.support.commands import call
from tests.support.runs import config, curve, flags_of
from tests.support.shards import reseal
from train.run import run as train_run


def test_checkpoints_that_were_deleted_are_no_invitation_to_begin_anew(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", epochs=1, save_every=4, keep=9, eval_captions=0)
    train_run(given)
    shutil.rmtree((tmp_path / "run/last").resolve())
    with pytest.raises(LlavaError, match=r"last points to step-00000012, .* ln -sfn step-00000010 .*last$"):
        train_run(given)
    for step in (tmp_path / "run").glob("step-*"):
        shutil.rmtree(step)
    assert train_run(given)["steps"] == 12  # finished: what came of it is still there
    with pytest.raises(LlavaError, match="holds a run with another --lr"):
        train_run(dataclasses.replace(given, lr=0.5))


def test_out_is_no_checkpoint_and_no_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_run(config(world, tmp_path / "run", max_steps=2, eval_features=None))
    for command in ("run", "plan"):
        flags = flags_of(config(world, tmp_path / "run/last", eval_features=None))
        assert "last is a checkpoint; choose another" in call("train", command, *flags, code=1).one_line()
    (tmp_path / "file").touch()
    flags = flags_of(config(world, tmp_path / "file/run"))
    assert "--out; expected a folder; got the file" in call("train", "run", *flags, code=2).one_line()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train_run(config(world, Path(), max_steps=2, eval_features=None))
    assert (tmp_path / "here/last/model.safetensors").is_file()


def test_a_start_from_a_checkpoint_is_compared_with_it_and_needed_once(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(config(world, tmp_path / "first", epochs=1, eval_captions=0))
    start = shutil.copytree((tmp_path / "first/best").resolve(), tmp_path / "start")
    given = config(
        world, tmp_path / "worse", init=start, lr=0.5, epochs=1, save_every=4, keep=9, eval_captions=0
    )
    train_run(given)
    losses = curve(tmp_path / "worse", "eval_loss")
    said = f"no step was better than {start}: held-out loss {losses[0]:.4f} there, "
    assert f"{said}{min(losses[10], losses[12]):.4f} here" in capfd.readouterr().err
    shutil.rmtree(start)
    (tmp_path / "worse/summary.json").unlink()
    (tmp_path / "worse/last").unlink()
    (tmp_path / "worse/last").symlink_to("step-00000008")
    train_run(given)
    assert curve(tmp_path / "worse", "eval_loss")[12] == losses[12]
    for command in ("run", "plan"):
        ended = call("train", command, *flags_of(dataclasses.replace(given, out=tmp_path / "new")), code=1)
        assert f"no checkpoint in {start}" in ended.one_line()
    other = dataclasses.replace(given, out=tmp_path / "new", init=tmp_path / "first/best", projector="mlp")
    for command in ("run", "plan"):
        ended = call("train", command, *flags_of(other), code=1)
        assert "give --projector linear --visual-tokens all" in ended.one_line()


def test_features_that_are_no_numbers_are_not_the_rate_s_fault(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "held-out", tmp_path / "held-out")
    with h5py.File(tmp_path / "held-out/c.h5", "r+") as file:
        file["features"][2, 0, 0] = math.nan
        file["xxh3"][2] = xxhash.xxh3_64_intdigest(file["features"][2].tobytes())
    reseal(tmp_path / "held-out/c.h5")
    given = config(world, tmp_path / "run", eval_features=tmp_path / "held-out")
    with pytest.raises(LlavaError, match="held-out loss is nan before the first step; look for numbers"):
        train_run(given)
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines if "attention" not in line] == [0]


def test_a_damaged_row_ends_a_run_where_it_is_first_read(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "features", tmp_path / "features")
    path = tmp_path / "features/b.h5"
    data = bytearray(path.read_bytes())
    layout = Shard(path).layout
    zeros = slice(
        layout.offsets["features"] + 5 * layout.row_bytes, layout.offsets["features"] + 6 * layout.row_bytes
    )
    data[zeros] = bytes(layout.row_bytes)
    path.write_bytes(data)
    given = config(world, tmp_path / "run", features=tmp_path / "features")
    line = call("train", "run", *flags_of(given), code=1).one_line()
    assert line.startswith(f"error: row 5 of {path} is damaged; `extract verify --out {path.parent}` names")
    assert f"`extract retry-failed --out {path.parent} --status damaged --vision …`" in line
