"""`--text`: words of other tables, joined to cached features by the names of their pictures."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llava_align import AlignedModel, FeatureDataset
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.row_status import Status
from llava_core.shards.dialogue import Dialogue
from llava_core.shards.folder import find_shards
from llava_core.shards.other_words import with_words
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.commands import call, run
from tests.support.pictures import picture
from tests.support.runs import config, curve, flags_of, weights
from tests.support.shards import header, outcome
from train.config import EvalConfig
from train.evaluate import run as eval_run
from train.run import run as train_run

ROWS = 12
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pictures(world: Path) -> Path:
    """Two shards of pictures with names of their own."""
    folder = world / "pictures"
    for s, name in enumerate(("a", "b")):
        captions = [f"图{row} of {name}" for row in range(ROWS)]
        made = dataclasses.replace(
            header(captions),
            urls=[f"http://example.org/{name}/{row}.jpg" for row in range(ROWS)],
            ids=[f"{name}{row}" for row in range(ROWS)],
        )
        with ShardWriter(folder / f"{name}.h5", made) as writer:
            records = [dataclasses.replace(outcome(row + ROWS * s), row=row) for row in range(ROWS)]
            writer.write(records)
            writer.finish()
    return folder


def named(key: str) -> Rows:
    """The captions of the shards, by the names of their pictures."""
    rows: Rows = []
    for s, name in enumerate(("a", "b")):
        for row in range(ROWS):
            digest = outcome(row + ROWS * s).sha256
            names: dict[str, dict[str, Any]] = {
                "url": {"URL": f"http://example.org/{name}/{row}.jpg"},
                "id": {"id": f"{name}{row}"},
                "sha256": {"sha256": digest.hex().upper()},
                "shard and row": {"shard": f"{name}.h5", "row": row},
            }
            rows.append({**names[key], "caption": f"图{row} of {name}"})
    return rows


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows))


def write_lines(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


FORMATS: dict[str, Callable[[Path, Rows], None]] = {
    "x.parquet": write_parquet,
    "x.json": write_json,
    "x.jsonl": write_lines,
    "x.jsonl.gz": write_gzip,
    "x.csv": write_csv,
}


@pytest.fixture(scope="module")
def trained(world: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "own"
    train_run(config(world, out, features=pictures, eval_features=pictures))
    return out


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("url", "x.parquet"),
        ("id", "x.json"),
        ("sha256", "x.jsonl"),
        ("shard and row", "x.csv"),
        ("url", "x.jsonl.gz"),
    ],
)
def test_the_same_words_give_the_same_run(
    world: Path, pictures: Path, trained: Path, tmp_path: Path, key: str, name: str
) -> None:
    FORMATS[name](tmp_path / name, named(key))
    given = config(world, tmp_path / "run", features=pictures, eval_features=pictures)
    train_run(dataclasses.replace(given, text=str(tmp_path / name), eval_text=str(tmp_path / name)))
    assert curve(tmp_path / "run") == curve(trained)
    assert curve(tmp_path / "run", "eval_loss") == curve(trained, "eval_loss")


def test_several_texts_a_picture_and_what_does_not_join(
    world: Path, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    dialogue = [
        {"from": "system", "value": "简短。"},
        {"from": "human", "value": "<image>什么？"},
        {"from": "gpt", "value": "猫"},
        {"from": "human", "value": "在哪里？"},
        {"from": "gpt", "value": "左边"},
    ]
    lines: Rows = [
        {"image": "http://example.org/a/1.jpg", "conversations": dialogue},
        {"image": "http://example.org/a/1.jpg", "conversations": dialogue[1:3]},
        {"image": "http://example.org/b/2.jpg", "conversations": dialogue[1:]},
        {"image": "http://example.org/c/2.jpg", "conversations": dialogue},
        {"image": "http://example.org/b/3.jpg", "conversations": []},
    ]
    write_lines(tmp_path / "x.jsonl", lines)
    flags = ("--checkpoint", trained / "last", "--features", pictures, "--llm", world / "llm")
    ended = call("train", "eval", *flags, "--text", tmp_path / "x.jsonl", "--json")
    assert ended.summary["samples"] == 3
    assert ended.summary["pictures"] == 2
    assert "3 texts joined by image; 1 about no image here, such as 'http://example.o" in ended.err
    assert "1 without text" in ended.err
    assert "3 texts about 2 pictures of 24" in ended.err
    call("train", "plan", *flags[2:], "--out", tmp_path / "run", "--text", str(tmp_path / "*.jsonl"))


def test_questions_of_other_words_are_asked_about_the_same_pictures(
    world: Path, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    """`shard`, `row` and `id` are those of the picture, so that `infer score` finds it."""
    talk = [
        {"role": "system", "content": "短"},
        {"role": "user", "content": "<image>颜色？"},
        {"role": "assistant", "content": "红"},
    ]
    lines: Rows = [
        {"id": "b2", "messages": talk},
        {"id": "a1", "messages": talk[1:]},
        {"id": "b2", "messages": talk[1:]},
        {"id": "no", "messages": talk},
    ]
    write_lines(tmp_path / "x.jsonl", lines)
    models = ("--checkpoint", trained / "last", "--llm", world / "llm")
    flags = (*models, "--features", pictures, "--text", tmp_path / "x.jsonl")
    ended = call("infer", "batch", *flags, "--output", tmp_path / "out.jsonl", "--max-tokens", 8)
    assert "1 about no image here, such as 'no'" in ended.err
    absent = (*models, "--features", pictures, "--text", tmp_path / "absent.jsonl")
    line = call("infer", "batch", *absent, "--output", tmp_path / "none.jsonl", code=1).one_line()
    assert line.endswith("absent.jsonl; give --text one that is there, or a pattern of some")
    said = read_json_lines(tmp_path / "out.jsonl")
    places = [(each["shard"], each["row"], each["id"], each.get("system")) for each in said]
    assert places == [("a.h5", 1, "a1", None), ("b.h5", 2, "b2", "短"), ("b.h5", 2, "b2", None)]
    assert {(each["prompt"], each["caption"]) for each in said} == {("颜色？", "红")}
    model = AlignedModel.load(trained / "last", llm=world / "llm")
    rows = {row.id: row for row in FeatureDataset(pictures)}
    for each in said:
        chat = model.chat(rows[each["id"]], system=each.get("system", ""), max_tokens=8)
        assert each["answer"] == chat.ask("颜色？")
    assert said[1]["answer"] != said[2]["answer"]

    write_lines(tmp_path / "y.jsonl", [{"id": name, "caption": name} for name in ("a0", "a1", "b2", "b2")])
    flags = (*models, "--features", pictures, "--text", tmp_path / "y.jsonl")
    call("infer", "rank", *flags, "--choices", 3, "--output", tmp_path / "ranks.jsonl")
    assert {tuple(sorted(each["texts"])) for each in read_json_lines(tmp_path / "ranks.jsonl")} == {
        ("a0", "a1", "b2")
    }
    flags = (*models, "--input", tmp_path / "x.jsonl", "--text", tmp_path / "x.jsonl")
    line = call(
        "infer", "batch", *flags, "--vision", world, "--output", tmp_path / "no.jsonl", code=2
    ).one_line()
    assert line == "error: --text; expected --features, whose rows it is about"


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOLD = [{"role": "system", "content": "短"}, *SAID]


@pytest.mark.parametrize(
    ("row", "dialogue"),
    [
        ({"messages": SAID, "system": "短"}, Dialogue((("q", "a"),), "短")),
        ({"messages": TOLD, "system": "另"}, Dialogue((("q", "a"),), "另\n短")),
        ({"query": "b", "response": "c", "history": [["q", "a"]]}, Dialogue((("q", "a"), ("b", "c")))),
        ({"query": "b", "response": "c", "system": "短"}, Dialogue((("b", "c"),), "短")),
        ({"caption": ["图", "画"]}, Dialogue(((None, "图"), (None, "画")))),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_words_are_read_as_extract_reads_them(
    pictures: Path, vision: Path, tmp_path: Path, row: dict[str, Any], dialogue: Dialogue, name: str
) -> None:
    """Columns of system messages, questions and earlier turns beside the answers, too."""
    FORMATS[name](tmp_path / name, [{**row, "images": ["http://example.org/b/3.jpg"]}])
    _, b = with_words(find_shards(pictures), str(tmp_path / name))
    assert (b.rows, b.dialogue(0), b.picture_keys(0)) == (1, dialogue, Shard(b.path).picture_keys(3))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.jpg").write_bytes(picture(1))
    FORMATS[name](tmp_path / "data" / name, [{**row, "images": ["1.jpg"]}])
    flags = ("--vision", vision, "--out", tmp_path / "features", "--device", "cpu")
    call("extract", "run", "--data", tmp_path / "data" / name, *flags)
    (path,) = (tmp_path / "features").glob("*.h5")
    assert Shard(path).dialogue(0) == dialogue


def test_names_are_compared_as_text_and_none_is_no_name(tmp_path: Path) -> None:
    """Tables with a missing number have 7.0 for the id 7; a row without a URL is about no picture."""
    made = header(list("abcde"))
    urls = ["http://example.org/7.jpg", "", "None", "http://example.org/8.jpg", "http://example.org/9.jpg"]
    made = dataclasses.replace(made, ids=["7", "None", "x.0", "two", "two"], urls=urls)
    with ShardWriter(tmp_path / "f/a.h5", made) as writer:
        writer.write([dataclasses.replace(outcome(row), row=row) for row in range(5)])
        writer.finish()

    def joined(*names: dict[str, Any]) -> list[int]:
        write_parquet(tmp_path / "x.parquet", [{**name, "caption": "图"} for name in names])
        (shard,) = with_words(find_shards(tmp_path / "f"), str(tmp_path / "x.parquet"))
        known = [Shard(shard.path).picture_keys(row) for row in range(5)]
        return [known.index(shard.picture_keys(row)) for row in range(shard.rows)]

    assert joined({"id": 7}) == [0]
    assert joined({"id": 7.0}, {"id": None}) == [0]
    assert joined({"id": "two"}, {"id": "7"}) == [0]
    assert joined({"id": "7.0"}, {"id": "x.0"}) == [0, 2]
    assert joined({"url": "http://example.org/7.jpg"}, {"url": ""}, {"url": None}) == [0]
    assert joined({"shard": "a", "row": 2.0}, {"shard": "a.h5", "row": None}) == [2]


def test_an_interrupted_run_goes_on_and_other_words_are_refused(
    world: Path, pictures: Path, tmp_path: Path
) -> None:
    write_lines(tmp_path / "x.jsonl", named("id") * 2)
    text = str(tmp_path / "x.jsonl")
    given = config(world, tmp_path / "run", features=pictures, eval_features=None, text=text)
    train_run(dataclasses.replace(given, out=tmp_path / "whole"))
    train_run(given)
    last = given.out / "last"
    (given.out / "summary.json").unlink()
    last.unlink()
    last.symlink_to("step-00000020")
    (tmp_path / "x.jsonl").rename(tmp_path / "y.jsonl")
    train_run(dataclasses.replace(given, text=str(tmp_path / "y.jsonl")))
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(given.out).items())
    (given.out / "summary.json").unlink()
    last.unlink()
    last.symlink_to("step-00000020")
    write_lines(tmp_path / "y.jsonl", [{**row, "caption": "other"} for row in named("id") * 2])
    with pytest.raises(LlavaError, match="have changed since the run in"):
        train_run(dataclasses.replace(given, text=str(tmp_path / "y.jsonl")))


def test_a_sweep_compares_words(
    world: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by the same held-out words; best.yaml finds its own from every working directory."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "own.jsonl", named("id"))
    write_lines(tmp_path / "short.jsonl", [{**row, "caption": "图"} for row in named("id")])
    given = config(world, tmp_path / "sweep", features=pictures, eval_features=pictures, max_steps=6)
    call("train", "sweep", *flags_of(given), "--space", "text=own.jsonl,short.jsonl")
    losses = [curve(trial, "eval_loss")[6] for trial in sorted((tmp_path / "sweep/trials").iterdir())]
    train_run(dataclasses.replace(given, out=tmp_path / "lone", text=str(tmp_path / "own.jsonl")))
    assert min(losses) == pytest.approx(curve(tmp_path / "lone", "eval_loss")[6], rel=1e-6)
    assert len(set(losses)) == 2
    monkeypatch.chdir(tmp_path.parent)
    call("train", "run", "-c", tmp_path / "sweep/best.yaml", "--out", tmp_path / "again")
    assert curve(tmp_path / "again", "eval_loss")[6] == pytest.approx(min(losses), rel=1e-6)


def test_what_cannot_be_joined_is_one_line(
    world: Path, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    given = EvalConfig(checkpoint=trained / "last", features=pictures, llm=world / "llm")

    def refused(rows: Rows) -> str:
        write_lines(tmp_path / "x.jsonl", rows)
        with pytest.raises(LlavaError) as caught:
            eval_run(dataclasses.replace(given, text=str(tmp_path / "x.jsonl")))
        return str(caught.value)

    assert "belongs to an image of" in refused([{"id": "z", "caption": "a"}])
    assert "expected id such as 'a0'; got 'z'" in refused([{"id": "z", "caption": "a"}])
    assert "names no images; expected a column sha256, url, image or id" in refused([{"caption": "a"}])
    assert "has no column of words" in refused([{"id": "a0", "words": "a"}])
    assert "line 2 is not JSON" in refused_text(given, tmp_path, '{"id": "a0", "caption": "a"}\n{"id"')
    flags = ("--checkpoint", given.checkpoint, "--features", pictures, "--llm", given.llm)
    line = call("train", "eval", *flags, "--text", tmp_path / "no.jsonl", code=1).one_line()
    assert "no file" in line
    write_gzip(tmp_path / "cut.jsonl.gz", [{"id": "a0", "caption": str(k * 7919)} for k in range(40_000)])
    with (tmp_path / "cut.jsonl.gz").open("rb+") as file:
        file.truncate((tmp_path / "cut.jsonl.gz").stat().st_size // 2)
    line = call("train", "eval", *flags, "--text", tmp_path / "cut.jsonl.gz", code=1).err.splitlines()[-1]
    assert "cut.jsonl.gz is a damaged gzip file" in line


def test_ids_that_several_pictures_have_name_none(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the rows' numbers, which are ids where the data has none, in a cache of several shards."""
    for s, ids in enumerate((["0", "1"], ["0", "x"])):
        made = dataclasses.replace(header(["a", "b"]), ids=ids)
        with ShardWriter(tmp_path / f"f/{s}.h5", made) as writer:
            writer.write([dataclasses.replace(outcome(row + 2 * s), row=row) for row in range(2)])
            writer.finish()
    given = config(world, tmp_path / "run", features=tmp_path / "f", eval_features=None, max_steps=1)
    given = dataclasses.replace(given, text=str(tmp_path / "x.jsonl"))
    write_lines(tmp_path / "x.jsonl", [{"id": "0", "caption": "图"}])
    with pytest.raises(LlavaError, match="several images have the id '0'; name them by shard and row"):
        train_run(given)
    write_lines(tmp_path / "x.jsonl", [{"id": "0", "caption": "图"}, {"id": "x", "caption": "图"}])
    train_run(given)
    assert "1 of an id that several images have, such as '0'" in capfd.readouterr().err


def test_words_that_cannot_be_read_are_counted_apart(
    world: Path, pictures: Path, trained: Path, tmp_path: Path
) -> None:
    """And halves of surrogate pairs, which UTF-8 has not, are replaced as in a shard."""
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    tool = [{"from": "tool", "value": "q"}, said[1]]
    lines: Rows = [{"id": "a0", "conversations": said}, {"id": "a1", "conversations": tool},
             {"id": "a2", "conversations": said[:1]}, {"id": "a3", "conversations": None},
             {"id": "a4", "conversations": [said[0], {"from": "gpt", "value": "\ud83d"}]},
             {"id": "\ud83d", "conversations": said}]  # fmt: skip
    write_lines(tmp_path / "x.jsonl", lines)
    flags = ("--checkpoint", trained / "last", "--features", pictures, "--llm", world / "llm")
    ended = call("train", "eval", *flags, "--text", tmp_path / "x.jsonl", "--json")
    assert ended.summary["samples"] == 2
    assert "2 whose text cannot be read, such as unknown role 'tool'; 1 without text" in ended.err


def test_damaged_tables_are_one_line(world: Path, pictures: Path, trained: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", trained / "last", "--features", pictures, "--llm", world / "llm")
    write_gzip(tmp_path / "x.jsonl.gz", named("id") * 500)
    packed = (tmp_path / "x.jsonl.gz").read_bytes()
    late = pa.array([1 << 62], pa.timestamp("us"))  # a time that Python has not
    pq.write_table(pa.table({"id": ["a0"], "caption": ["a"], "when": late}), tmp_path / "x.parquet")
    call("train", "eval", *flags, "--text", tmp_path / "x.parquet")
    deep = b'{"id": "a0", "caption": ' + b"[" * 100_000
    damaged = {"cut": packed[: len(packed) // 2], "end": packed[:-4], "crc": packed[:-8] + bytes(8)}
    for name, data in {**damaged, "flip": packed[:30] + bytes(30) + packed[60:]}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
        line = call("train", "eval", *flags, "--text", tmp_path / f"{name}.jsonl.gz", code=1).one_line()
        assert f"{name}.jsonl.gz is a damaged gzip file" in line
    (tmp_path / "deep.jsonl").write_bytes(deep)
    assert (
        "is not JSON" in call("train", "eval", *flags, "--text", tmp_path / "deep.jsonl", code=1).one_line()
    )


def test_a_full_disk_is_named(world: Path, pictures: Path, small_disk: Path, tmp_path: Path) -> None:
    """The words are kept where TMPDIR says."""
    write_lines(tmp_path / "x.jsonl", [{"id": "a0", "caption": "x" * 1000}] * 2000)
    flags = ("--features", pictures, "--llm", world / "llm", "--out", tmp_path / "run")
    line = run("train", "plan", *flags, "--text", tmp_path / "x.jsonl", code=1, TMPDIR=small_disk).one_line()
    assert f"no room for the texts of --text in {small_disk}; got No space left on device; set TMPDIR" in line


def test_without_a_picture_there_is_nothing_to_join(world: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "dead/a.h5", header(["x"])) as writer:
        writer.write([RowRecord(0, Status.TEXT_ONLY)])
        writer.finish()
    write_lines(tmp_path / "x.jsonl", [{"id": "a0", "caption": "a"}])
    given = config(world, tmp_path / "run", features=tmp_path / "dead", text=str(tmp_path / "x.jsonl"))
    assert "no row with features in" in call("train", "run", *flags_of(given), code=1).one_line()


def refused_text(given: EvalConfig, folder: Path, text: str) -> str:
    (folder / "y.jsonl").write_text(text)
    with pytest.raises(LlavaError) as caught:
        eval_run(dataclasses.replace(given, text=str(folder / "y.jsonl")))
    return str(caught.value)
