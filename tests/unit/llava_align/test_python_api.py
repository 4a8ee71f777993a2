"""`import llava_align`: what it loads, data sets, commands as functions, and classes of one's own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import llava_align
from llava_align import FeatureDataset, LlavaError
from llava_align.commands import typed
from llava_core.language.sampling import Sampling
from llava_core.shards.reader import Shard
from tests.support.paths import ROOT
from tests.support.runs import curve, write_runs
from tests.support.shards import write_shard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("api"))


def test_importing_it_loads_nothing_heavy_and_every_name_is_there() -> None:
    code = (
        "import sys, llava_align; print({'torch', 'numpy', 'h5py', 'PIL'} & set(sys.modules));"
        "[getattr(llava_align, name) for name in dir(llava_align)]"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "set()\n"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        llava_align.Nothing  # noqa: B018


def test_a_data_set_has_the_rows_with_features_of_all_folders(world: Path, tmp_path: Path) -> None:
    data = FeatureDataset([world / "features", world / "held-out/c.h5"])
    a, b, c = (Shard(world / name) for name in ("features/a.h5", "features/b.h5", "held-out/c.h5"))
    assert len(data) == 24 + 24 + 10
    assert data.left_out == 3
    assert repr(data) == "FeatureDataset(58 rows of [5, 12], 3 without features left out)"
    row = data[24]  # the first of b that is whole
    assert row.features.dtype == torch.float16
    np.testing.assert_array_equal(row.features, b.read(1))
    assert (row.text, row.id, row.url) == (b.caption(1), b.id(1), b.url(1))
    assert data[-1].text == c.caption(9)
    chosen = data.select([57, 0]).select(slice(0, 1))
    assert [row.text for row in chosen] == [c.caption(9)]
    assert FeatureDataset(world / "features", rows=range(2)).text(1) == a.caption(1)
    assert data.turns(0) == ((None, a.caption(0)),)
    assert (chosen.left_out, repr(chosen)) == (0, "FeatureDataset(1 rows of [5, 12])")
    write_shard(tmp_path / "other.h5", rows=2, size=9)
    with pytest.raises(LlavaError, match="hold features of different encoders"):
        FeatureDataset([world / "features", tmp_path])


def test_rows_are_selected_by_slice_indices_or_mask(world: Path) -> None:
    data = FeatureDataset(world / "features")
    mask = np.array([len(data.text(k)) > 8 for k in range(len(data))])
    assert 2 < mask.sum() < len(data)
    wanted = [data.text(int(k)) for k in np.flatnonzero(mask)]
    for rows in (mask, mask.tolist(), torch.from_numpy(mask), np.flatnonzero(mask).astype("u8")):
        chosen = data.select(rows)
        assert [chosen.text(k) for k in range(len(chosen))] == wanted
        assert len(FeatureDataset(world / "features", rows=rows)) == len(wanted)
    assert len(data.select([])) == 0
    for wrong in ([0.5], [1.0, 2.0], np.argwhere(mask), ["1"], {1, 2}, 3):
        with pytest.raises(TypeError, match="expected a slice, a list of indices or a mask of bools; got"):
            data.select(wrong)  # type: ignore[arg-type]
    for outside in (np.array([len(data)]), mask[1:]):
        with pytest.raises(IndexError):
            data.select(outside)
    for many in (slice(0, 2), [0, 1], mask, 1.0):
        with pytest.raises(TypeError, match="expected the index of one row, got"):
            data[many]  # type: ignore[index]
    assert data[np.int64(3)].text == data.text(torch.tensor(3)) == data.text(3)  # type: ignore[arg-type]
    with pytest.raises(LlavaError, match="no features; expected a folder of shards"):
        FeatureDataset([])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_data_set_feeds_the_workers_of_a_loader(world: Path, start: str) -> None:
    data = FeatureDataset(world / "features").select(range(16))
    loader = DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context=start)
    batches = list(loader)
    assert [tuple(batch.features.shape) for batch in batches] == [(8, 5, 12)] * 2
    assert [text for batch in batches for text in batch.text] == [row.text for row in data]


def test_training_and_a_sweep_from_python(world: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "llm": str(world / "llm"),
        "device": "cpu",
        "max_steps": 2,
        "batch_size": 4,
        "eval_captions": 0,
    }
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    trained = llava_align.train(
        world / "features", eval_features=world / "held-out", out=tmp_path / "run", lr=1, **common
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (trained.steps, trained.checkpoint) == (2, tmp_path / "run/best")
    assert trained.loss == json.loads((trained.checkpoint / "metrics.json").read_text())["eval_loss"]
    again = llava_align.train(
        world / "features", eval_features=world / "held-out", out=tmp_path / "run", lr=1, **common
    )
    assert again == trained
    swept = llava_align.sweep(
        str(world / "features"),
        space={"lr": [1e-3, 1e-2], "projector": "linear,mlp"},
        eval_features=world / "held-out",
        out=tmp_path / "sweep",
        recipe="course",
        **{**common, "max_text_tokens": 64},
    )
    assert swept.figures["finished"] == 4
    assert (swept.checkpoint / "config.json").exists()


def test_curation_and_scaling_from_python(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "list.parquet"
    curated = llava_align.curate([world / "features"], out=out, language="any", html=tmp_path / "page.html")
    assert (curated.out, curated.rows, curated.kept) == (out, 48, curated.figures["kept"])
    common: dict[str, Any] = {
        "eval_features": world / "held-out",
        "llm": world / "llm",
        "out": tmp_path / "out",
    }
    flags: dict[str, Any] = {"device": "cpu", "batch_size": 4, "eval_captions": 0, "epochs": 1}
    scaled = llava_align.scaling(
        world / "features",
        sizes=[6, 12, 24],
        seeds=2,
        space={"lr": [1e-2, 2e-2]},
        rows=out,
        **common,
        **flags,
    )
    assert {law["lr"] for law in scaled.laws} == {1e-2, 2e-2}
    assert scaled.figures["finished"] == 12
    assert (scaled.checkpoint / "config.json").exists()
    with pytest.raises(LlavaError, match="sizes; expected a list of numbers, or"):
        llava_align.scaling(world / "features", sizes=500, **common)  # type: ignore[arg-type]


def test_what_python_asks_for_is_checked_as_the_commands_check_it(world: Path, tmp_path: Path) -> None:
    paths: dict[str, Any] = {"llm": world / "llm", "out": tmp_path / "run"}
    with pytest.raises(TypeError, match="unknown keyword 'learning_rate'"):
        llava_align.train(world / "features", **paths, learning_rate=1)
    with pytest.raises(LlavaError, match="lr; expected a value of type float; got '1e-3'"):
        llava_align.train(world / "features", **paths, lr="1e-3")
    with pytest.raises(LlavaError, match="decay; expected one of cosine, linear; got sine"):
        llava_align.train(world / "features", **paths, decay="sine")
    with pytest.raises(LlavaError, match="no language model folder"):
        llava_align.train(world / "features", llm="nowhere", out=tmp_path / "run")
    with pytest.raises(LlavaError, match="unknown recipe 'slow'"):
        llava_align.train(world / "features", **paths, recipe="slow")
    with pytest.raises(LlavaError, match="report_to; expected a list; got 5"):
        llava_align.train(world / "features", **paths, report_to=5)
    for key, wrong in (("max_steps", True), ("max_steps", 2.5), ("compile", 1), ("llm", 5), ("lr", [1e-3])):
        with pytest.raises(LlavaError, match=f"{key}; expected "):
            llava_align.train(world / "features", **{**paths, key: wrong})
    held_out: dict[str, Any] = {"eval_features": world / "held-out"}
    with pytest.raises(LlavaError, match=r"space\['lr'\]; expected a list of values, or a range such as"):
        llava_align.sweep(world / "features", **paths, **held_out, space={"lr": 1e-3})  # type: ignore[dict-item]
    with pytest.raises(LlavaError, match="--space; expected key=value,value or one YAML file; got none"):
        llava_align.sweep(world / "features", **paths, **held_out, space={})
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_and_torch_are_taken_as_pythons() -> None:
    given = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "top_p": np.float64(0.5),
             "top_k": torch.tensor(4), "repetition_penalty": 1, "stop": np.str_("。")}  # fmt: skip
    values = typed(Sampling, given)
    assert values == {**given, "temperature": 0.5, "top_p": 0.5, "top_k": 4, "stop": ("。",)}
    kinds = {name: type(value) for name, value in values.items()}
    assert list(kinds.values()) == [int, float, float, int, float, tuple]
    with pytest.raises(LlavaError, match="max_tokens; expected a value of type int; got '5'"):
        typed(Sampling, {"max_tokens": "5"})
    with pytest.raises(TypeError, match="unknown keyword 'temprature'; did you mean 'temperature'"):
        typed(Sampling, {"temprature": 1})


def test_the_loss_is_that_of_the_checkpoint(world: Path, tmp_path: Path) -> None:
    """`best`, though the last evaluation was worse."""
    trained = llava_align.train(
        world / "features",
        eval_features=world / "held-out",
        llm=world / "llm",
        out=tmp_path / "run",
        device="cpu",
        lr=np.float64(10),
        warmup=0.0,
        decay="linear",
        max_steps=2,
        eval_every=1,
        batch_size=4,
        eval_captions=0,
        instructions="mixed",
    )
    losses = list(curve(tmp_path / "run", "eval_loss").values())[1:]
    assert trained.loss == min(losses) < losses[-1] == trained.figures["eval_loss"]
    best = json.loads((trained.checkpoint / "metrics.json").read_text())
    assert trained.grounding_gap == best["eval_grounding_gap"] != trained.figures["eval_grounding_gap"]


def test_it_trains_in_a_thread_and_where_an_event_loop_runs(world: Path, tmp_path: Path) -> None:
    def train(name: str) -> int:
        paths: dict[str, Any] = {"llm": world / "llm", "out": tmp_path / name}
        return llava_align.train(world / "features", **paths, device="cpu", max_steps=1, batch_size=4).steps

    steps: list[int] = []
    thread = threading.Thread(target=lambda: steps.append(train("thread")))
    thread.start()
    thread.join()
    assert steps == [1]

    async def cell() -> int:
        return train("notebook")

    assert asyncio.run(cell()) == 1
