"""`train scaling`: a law through runs on subsets of the rows, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from llava_core.filesystem import read_json_lines
from tests.support.browser import dom_of
from tests.support.commands import call
from tests.support.runs import config, curve, flags_of, weights, write_runs
from tests.support.sweeps import results
from train.resources import TrainingResources

SIZES = "6,12,24,48"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("scaling"))


def command(world: Path, out: Path, *more: object, sizes: str = SIZES) -> list[object]:
    flags = flags_of(config(world, out, epochs=4, eval_every=500, eval_captions=0, log_every=4))
    return ["train", "scaling", *flags, "--sizes", sizes, *more]


@pytest.fixture(scope="module")
def out(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of four sizes and two seeds."""
    out = tmp_path_factory.mktemp("study") / "out"
    call(*command(world, out, "--seeds", 2))
    return out


def test_every_size_takes_as_many_passes_and_its_lowest_loss_counts(world: Path, out: Path) -> None:
    ended = call(*command(world, out, "--seeds", 2, "--json"))  # finished: it concludes again
    lines = results(out)
    steps = {line["max_samples"]: line["steps"] for line in lines.values()}
    assert steps == {6: 8, 12: 12, 24: 24, 48: 48}
    (law,) = ended.summary["laws"]
    assert law["sizes"] == [6, 12, 24, 48]
    assert [each["rows"] for each in law["predicted"]] == [96, 192]
    for figures, name in ((law, "alpha"), (law, "E"), *((each, "loss") for each in law["predicted"])):
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
    table = {row[0]: row for row in map(str.split, ended.out.splitlines()) if row[1:2] == ["2"]}
    for size in (6, 12, 24, 48):
        folders = [out / line["folder"] for line in lines.values() if line["max_samples"] == size]
        curves = [curve(folder, "eval_loss") for folder in folders]
        assert all(len(each) == 5 for each in curves)  # before, and after each pass
        lowest = [min(loss for step, loss in each.items() if step) for each in curves]
        assert float(table[str(size)][2]) == pytest.approx(sum(lowest) / 2, abs=6e-5)
    said = "96 rows, twice as many, are predicted to give a held-out loss of "
    assert f"{said}{law['predicted'][0]['loss']:.4f} (" in ended.err


def test_page_and_picture(out: Path, tmp_path: Path) -> None:
    assert (out / "scaling.png").stat().st_size > 10_000
    page = dom_of(out / "index.html", tmp_path)
    assert "More rows" in page
    assert "96 rows, twice as many" in page


def test_smaller_sizes_are_part_of_larger_ones_and_seeds_draw_others(world: Path, tmp_path: Path) -> None:
    given = config(world, tmp_path / "run", subset="random", max_samples=12)
    resources = TrainingResources(given, weights=False)

    def rows(**flags: object) -> set[tuple[int, ...]]:
        samples, _ = resources.samples(config(world, tmp_path / "run", subset="random", **flags))
        return set(map(tuple, samples.rows.tolist()))

    few, more = rows(max_samples=12), rows(max_samples=24)
    assert (len(few), len(more)) == (12, 24)
    assert few < more < rows(max_samples=48)
    assert few != rows(max_samples=12, seed=1)
    assert few != {
        tuple(row) for row in resources.samples(config(world, tmp_path, max_samples=12))[0].rows.tolist()
    }
    held_out = resources.samples(config(world, tmp_path, subset="random", eval_samples=4))[1]
    assert held_out is not None
    assert held_out.rows[:, 1].tolist() == [0, 1, 2, 3]


def test_a_run_on_the_same_rows_is_the_trial(world: Path, out: Path, tmp_path: Path) -> None:
    (line,) = (line for line in results(out).values() if (line["max_samples"], line["seed"]) == (12, 1))
    drawn = {"subset": "random", "max_samples": 12, "seed": 1}
    plain = config(world, tmp_path / "run", epochs=4, eval_every=3, **drawn)
    ended = call("train", "run", *flags_of(plain))
    assert "12 of 48 rows: --max-samples takes 12, drawn by --seed 1, of a folder" in ended.err
    trained, trial = weights(plain.out), weights(out / line["folder"])
    assert all(torch.equal(trained[name], value) for name, value in trial.items())


def test_each_setting_has_a_law_of_its_own(world: Path, tmp_path: Path) -> None:
    more = ("--seeds", 2, "--space", "lr=0.02,0.04", "--together", 2, "--epochs", 1, "--json")
    ended = call(*command(world, tmp_path / "out", *more, sizes="6,12,24"))
    assert {law["lr"] for law in ended.summary["laws"]} == {0.02, 0.04}
    assert "lr=0.02: " in ended.err
    assert (
        "6 rows of a folder take 2 steps; below 100 the loss depends on steps more than on rows" in ended.err
    )


def test_losses_that_do_not_fall_get_no_law(world: Path, tmp_path: Path) -> None:
    more = ("--lr", 1e-9, "--epochs", 1, "--seeds", 2, "--json")
    ended = call(*command(world, tmp_path / "out", *more, sizes="6,12,24"))
    assert "no law: the held-out loss does not fall with the number of rows by more than runs" in ended.err
    assert ended.summary["laws"][0]["alpha"] is None
    assert "No law: the held-out loss" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize(
    ("sizes", "flags", "message"),
    [
        ("6,12", (), "--sizes; expected 3 different sizes or more: the law has as many unknowns; got 6,12"),
        ("6,6,12,12", (), "--sizes; expected 3 different sizes"),
        ("", (), "--sizes; expected 3 different sizes or more: the law has as many unknowns; got none"),
        ("6,x,24", (), "--sizes; expected whole numbers above 0, such as 500,1k,2k,4k; got x"),
        ("6,1.5,24", (), "got 1.5"),
        ("20,22,80", (), "--sizes; expected each at least 1.25 times the one before, the last 4 times the "
                         "first; got 20 beside 22"),
        ("1.5k,2k,3k", (), "got 1,500 beside 3,000"),
        ("6,12,24,64", (), "--sizes; expected at most 48, the usable rows of "),
        ("6,12,24", ("--seeds", 10**6), "--sizes and --seeds; expected at most 100,000 trials; got 3,000"),
        ("6,12,24", ("--seeds", 1), "--sizes: three runs fit any law; expected four sizes, or --seeds 2"),
        (SIZES, ("--seeds", 0), "--seeds; expected a number above 0; got 0"),
        (SIZES, ("--max-samples", 24), "--max-samples beside --sizes; expected one of them"),
        (SIZES, ("--space", "seed=1,2"), "--space seed of a scaling law; give --seed and --seeds"),
        (SIZES, ("--space", "lr=1e-3..1e-2"), "--space of a scaling law; expected lists; got a range"),
        (SIZES, ("--trials", 3), "--trials: the law needs every size; leave out --trials"),
        (SIZES, ("--prune", "median"), "--prune: the law needs every size; leave out --prune"),
        (SIZES, ("--budget", "steps=3"), "--budget of a scaling law; leave out --budget"),
        (SIZES, ("--max-steps", 3), "each size takes as many passes (--epochs)"),
    ],
)  # fmt: skip
def test_sizes_that_fit_no_law_are_one_line(
    world: Path, tmp_path: Path, sizes: str, flags: tuple[object, ...], message: str
) -> None:
    ended = call(*command(world, tmp_path / "out", *flags, sizes=sizes), code=2)
    assert message in ended.one_line()
    assert not (tmp_path / "out").exists()


def test_held_out_rows_and_the_same_sizes_are_needed(world: Path, out: Path, tmp_path: Path) -> None:
    flags = ("--features", world / "features", "--llm", world / "llm", "--device", "cpu", "--sizes", SIZES)
    ended = call("train", "scaling", *flags, "--out", tmp_path / "out", code=2)
    assert ended.one_line() == "error: not given: --eval-features PATH …; --help explains each flag"
    ended = call(*command(world, out, "--seeds", 2, sizes="6,12,24"), code=1)
    assert "holds a sweep with another --space max-samples; expected [6, 12, 24, 48]" in ended.one_line()
    assert len(read_json_lines(out / "results.jsonl")) == 8
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])["state"] == "finished"


def test_sizes_are_those_of_every_list_of_rows(world: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.parquet"
    call("extract", "curate", "--features", world / "features", "--out", listed, "--language", "any")
    pq.write_table(pq.read_table(listed).slice(0, 20), listed)
    for flags in (("--rows", listed), ("--space", f"rows=all,{listed}")):
        ended = call(*command(world, tmp_path / "out", *flags, "--dry-run", sizes="6,12,24"), code=2)
        expected = f"at most 20, the usable rows of {world / 'features'} in {listed}"
        assert f"--sizes; expected {expected}; got 24" in ended.one_line()
    assert not (tmp_path / "out").exists()
