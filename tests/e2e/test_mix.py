"""Several caches in one run, rows without a picture, system messages, and dialogues of several questions."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import llava_align
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.row_status import Status
from llava_core.shards.dialogue import turns_to_text
from llava_core.shards.reader import Shard
from llava_core.shards.writer import RowRecord, ShardWriter
from tests.support.commands import call, started, wait_until
from tests.support.language_models import QWEN3_TEMPLATE, write_language_model
from tests.support.pictures import picture
from tests.support.runs import config, curve, flags_of, weights
from tests.support.shards import header, outcome, write_shard
from train.cost_prediction import run as plan_run
from train.data.schedule import Schedule
from train.resources import TrainingResources
from train.run import run as train_run

TALK = [{"role": "user", "content": "<image>什么？"}, {"role": "assistant", "content": "猫"},
        {"role": "user", "content": "颜色？"}, {"role": "assistant", "content": "红"}]  # fmt: skip
SYSTEM = {"role": "system", "content": "短"}


def write_talk(path: Path, rows: int, text_only: int, seed: int = 0, system: str | None = None) -> Path:
    """A shard of dialogues, the last `text_only` of them about no picture."""
    texts = [turns_to_text([("问", "红色" * (i % 3 + 1)), ("?", "b")], system) for i in range(rows)]
    made = dataclasses.replace(header(texts, path.stem + ".json"), conversations=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(path, made) as writer:
        shown = rows - text_only
        writer.write([outcome(i, seed) if i < shown else RowRecord(i, Status.TEXT_ONLY) for i in range(rows)])
        writer.finish()
    return path


@pytest.fixture(scope="module")
def caches(world: Path) -> Path:
    """Beside the world's folders: dialogues, a quarter of them about no picture, and a held-out few."""
    write_talk(world / "talk/t.h5", rows=12, text_only=3, seed=3)
    write_talk(world / "talk-held-out/t.h5", rows=6, text_only=2, seed=4)
    return world


def mixed(world: Path, out: Path, **flags: Any) -> Any:
    """A run on three caches by share."""
    write_shard(world / "more/a.h5", rows=9, seed=5) if not (world / "more/a.h5").exists() else None
    given: dict[str, Any] = {
        "features": (world / "features", world / "talk", world / "more"),
        "eval_features": (world / "held-out", world / "talk-held-out"),
        "mix": "0.6,0.3,0.1",
        "max_steps": 12,
    }
    return config(world, out, **{**given, **flags})


LORA: dict[str, Any] = {"tune": "lora", "lora_rank": 4}


@pytest.fixture(scope="module")
def mix_run(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mix") / "run"
    ended = call("train", "run", *flags_of(mixed(caches, out, **LORA)))
    assert "sources: features 48 samples, 60.0% of those drawn; talk 12 samples, 30.0%" in ended.err
    assert "3 samples without an image are trained as text" in ended.err
    assert "held-out loss of held-out " in ended.err
    assert "eval loss/talk-held-out" in ended.out
    return out


def test_held_out_loss_of_each_source_and_of_text(mix_run: Path) -> None:
    names = ("loss", "loss/held-out", "loss/talk-held-out", "loss_text")
    summary = json.loads((mix_run / "summary.json").read_text())
    for name in names:
        figures = curve(mix_run, f"eval_{name}")
        assert sorted(figures) == [0, 10, 12]
        assert figures[12] < figures[0], name
        assert summary[f"eval_{name}"] == figures[12]
        assert summary[f"eval_{name}_low"] <= figures[12] <= summary[f"eval_{name}_high"]


def test_rows_about_no_picture_and_system_messages_are_asked(
    caches: Path, mix_run: Path, tmp_path: Path
) -> None:
    write_talk(tmp_path / "talk/t.h5", rows=4, text_only=2, seed=4, system="短")
    flags = ("--checkpoint", mix_run / "last", "--llm", caches / "llm", "--features", tmp_path / "talk")
    ended = call("infer", "batch", *flags, "--output", tmp_path / "out.jsonl", "--max-tokens", 8)
    assert "4 dialogues of several questions: the first alone is asked" in ended.err
    model = llava_align.AlignedModel.load(mix_run / "last", llm=caches / "llm")
    shard = Shard(tmp_path / "talk/t.h5")
    for row, line in enumerate(read_json_lines(tmp_path / "out.jsonl")):
        chat = model.chat(shard.read(row) if row < 2 else None, system="短", max_tokens=8)
        assert (line["row"], line["system"], line["answer"]) == (row, "短", chat.ask("问"))
    ended = call("infer", "rank", *flags, "--output", tmp_path / "ranks.jsonl", "--choices", 2)
    assert "2 rows without an image or a caption, not ranked" in ended.err
    assert len(read_json_lines(tmp_path / "ranks.jsonl")) == 2


def test_a_mix_resumes_bit_equal_after_a_kill(caches: Path, mix_run: Path, tmp_path: Path) -> None:
    given = mixed(caches, tmp_path / "cut", **LORA, save_every=2, keep=1000)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, (given.out / "step-00000004").exists)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    call("train", "run", *flags_of(given), "--resume")
    assert curve(given.out) == curve(mix_run)
    assert curve(given.out, "eval_loss_text") == curve(mix_run, "eval_loss_text")
    assert all(torch.equal(weights(given.out)[name], own) for name, own in weights(mix_run).items())


def test_splitting_a_step_changes_nothing(caches: Path, mix_run: Path, tmp_path: Path) -> None:
    train_run(mixed(caches, tmp_path / "split", **LORA, micro_tokens=150, resident="disk"))
    assert curve(tmp_path / "split") == pytest.approx(curve(mix_run), rel=1e-4)


def test_a_mix_in_two_processes_is_that_of_one(caches: Path, mix_run: Path, tmp_path: Path) -> None:
    given = mixed(caches, tmp_path / "two", **LORA)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    with started(*launcher, "-m", "train", "run", *flags_of(given)) as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    for key in ("loss", "eval_loss", "eval_loss_text", "eval_loss/talk-held-out"):
        assert curve(given.out, key) == pytest.approx(curve(mix_run, key), rel=1e-6), key


def test_from_python(caches: Path, mix_run: Path, tmp_path: Path) -> None:
    given = mixed(caches, tmp_path / "python", **LORA)
    flags = {"instructions": "mixed", **LORA}
    for name in (
        "llm",
        "mix",
        "max_steps",
        "batch_size",
        "lr",
        "epochs",
        "device",
        "log_every",
        "eval_every",
    ):
        flags[name] = getattr(given, name)
    trained = llava_align.train(
        [str(folder) for folder in given.features], eval_features=given.eval_features, out=given.out, **flags
    )
    assert curve(given.out) == curve(mix_run)
    assert trained.figures["eval_loss_text"] == curve(mix_run, "eval_loss_text")[12]


def test_each_source_has_its_share_in_each_block_and_its_own_epochs(caches: Path) -> None:
    schedule = Schedule.of(mixed(caches, Path("o"), epochs=9, max_steps=None, batch_size=10), [48, 12, 9])
    ends, seen = (48, 60, 69), collections.Counter[tuple[int, int, int]]()
    for step in range(schedule.steps):
        epochs, indices = schedule.at(step)
        sources = [sum(index >= end for end in ends) for index in indices]
        assert sorted(sources) == [0] * 6 + [1] * 3 + [2]
        seen.update(zip(sources, epochs, indices, strict=True))
    assert max(seen.values()) == 1  # once in each of its source's epochs
    whole = {(source, epoch) for source, epoch, _ in seen}
    assert {(0, 6), (1, 14), (2, 5)} <= whole
    assert schedule.steps == 9 * 7
    assert schedule.read == 69
    assert schedule.repeats


def test_without_shares_caches_are_one_set(caches: Path, tmp_path: Path) -> None:
    """The samples of two folders are those of one folder that has the shards of both."""
    (tmp_path / "one").mkdir()
    for path in (caches / "features").glob("*.h5"):
        (tmp_path / path.stem).mkdir()
        for folder in (tmp_path / "one", tmp_path / path.stem):
            (folder / path.name).symlink_to(path)
    flags: dict[str, Any] = {"max_steps": 6, "eval_features": None}
    train_run(config(caches, tmp_path / "whole", features=tmp_path / "one", **flags))
    train_run(config(caches, tmp_path / "parts", features=(tmp_path / "a", tmp_path / "b"), **flags))
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    recorded = yaml.safe_load((tmp_path / "whole/training_config.yaml").read_text())
    assert recorded["features"] == str(tmp_path / "one")


def test_stage_1_leaves_text_out_and_counts_it(caches: Path, tmp_path: Path) -> None:
    given = config(caches, tmp_path / "run", features=caches / "talk", eval_features=None, max_steps=1)
    assert "3 rows without an image left out" in call("train", "run", *flags_of(given)).err
    assert plan_run(given)["samples"] == 9
    planned = plan_run(dataclasses.replace(given, out=tmp_path / "other", tune="lora"))
    assert planned["samples"] == 12
    shard = Shard(caches / "talk/t.h5")
    assert planned["feature_bytes_per_epoch"] == 9 * shard.layout.row_bytes


def test_max_samples_leaves_no_row_out_without_a_word(caches: Path, tmp_path: Path) -> None:
    given = config(caches, tmp_path / "run", features=caches / "talk", eval_features=None, max_steps=1)
    few = dataclasses.replace(given, max_samples=5)
    line = "5 of 9 rows: --max-samples takes the first 5 of a folder"
    assert line in call("train", "plan", *flags_of(few)).err
    texts = dataclasses.replace(given, max_samples=11, tune="lora")
    assert "11 of 12 rows: --max-samples" in call("train", "plan", *flags_of(texts)).err
    for all_of_them in (given, dataclasses.replace(given, max_samples=9)):
        assert "--max-samples" not in call("train", "plan", *flags_of(all_of_them)).err


def test_a_sweep_and_an_evaluation_take_several(caches: Path, mix_run: Path, tmp_path: Path) -> None:
    given = mixed(caches, tmp_path / "sweep", max_steps=2, eval_captions=0)
    call("train", "sweep", *flags_of(given), "--space", "lr=0.01,0.02")
    best = yaml.safe_load((tmp_path / "sweep/best.yaml").read_text())
    assert (best["mix"], len(best["features"])) == ("0.6,0.3,0.1", 3)
    call("train", "run", "-c", tmp_path / "sweep/best.yaml", "--out", tmp_path / "again")
    folders = (caches / "held-out", caches / "talk-held-out")
    ended = call("train", "eval", "--checkpoint", mix_run / "last", "--features", *folders, "--llm",
                 caches / "llm", "--instructions", "mixed", "--json")  # fmt: skip
    for name in ("loss", "loss_text", "loss/talk-held-out"):
        assert ended.summary[name] == pytest.approx(curve(mix_run, f"eval_{name}")[12], rel=1e-5)
    alone = call("train", "eval", "--checkpoint", mix_run / "last", "--features", folders[1], "--llm",
                 caches / "llm", "--instructions", "mixed", "--json").summary  # fmt: skip
    assert ended.summary["loss_text"] == pytest.approx(alone["loss_text"], rel=1e-5)
    low, high = sorted((alone["loss"], alone["loss_text"]))
    assert low < ended.summary["loss/talk-held-out"] < high


@pytest.mark.parametrize(
    ("flags", "line", "code"),
    [
        ({"mix": "0.5,0.5"}, "--mix; expected 3 numbers, one for each folder", 2),
        ({"mix": "0,0,0"}, "--mix; expected shares above 0", 2),
        ({"mix": "a,b,c"}, "--mix; expected 3 numbers", 2),
        ({"mix": "1,-1,1"}, "--mix; expected shares above 0", 2),
        ({"again": True}, "--features names shards twice", 2),
        ({"other": True}, "hold features of different encoders", 1),
        ({"none": True}, "no usable row in", 1),
    ],
)
def test_a_mix_that_cannot_be_is_one_line(
    caches: Path, tmp_path: Path, flags: dict[str, Any], line: str, code: int
) -> None:
    given = mixed(caches, tmp_path / "run")
    if flags.get("again"):
        flags = {"features": (caches / "features", caches / "talk", caches / "talk/t.h5")}
    if flags.get("other"):
        write_shard(tmp_path / "other/o.h5", size=64)
        flags = {"features": (caches / "features", caches / "talk", tmp_path / "other")}
    if flags.get("none"):
        write_shard(tmp_path / "none/o.h5", rows=2, failed=[0, 1])
        flags = {"features": (caches / "features", caches / "talk", tmp_path / "none")}
    typed = flags_of(given)
    for name, value in flags.items():
        at = typed.index(f"--{name}") + 1
        end = next((k for k in range(at, len(typed)) if typed[k].startswith("--")), len(typed))
        typed[at:end] = [value] if isinstance(value, str) else list(map(str, value))
    assert line in call("train", "run", *typed, code=code).one_line()
    assert not (tmp_path / "run").exists()


def extracted(vision: Path, data: Path, out: Path) -> Shard:
    call("extract", "run", "--data", data, "--vision", vision, "--out", out, "--device", "cpu")
    (path,) = out.glob("*.h5")
    return Shard(path)


def write_pictures(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        (folder / name).write_bytes(picture(k))


def llava_json(folder: Path) -> tuple[Path, int]:
    write_pictures(folder, ["a.jpg", "b.jpg"])
    spoken = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TALK]
    text = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}]
    told = [{"from": "system", "value": "短"}, *spoken]
    rows = [{"id": 1, "image": "a.jpg", "conversations": spoken}, {"id": 2, "conversations": text},
            {"id": 3, "image": "b.jpg", "conversations": told}]  # fmt: skip
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json", 1


def ms_swift(folder: Path) -> tuple[Path, int]:
    write_pictures(folder, ["a.jpg", "b.jpg"])
    rows = [{"messages": TALK, "images": ["a.jpg"]}, {"messages": [SYSTEM, *TALK], "images": ["b.jpg"]},
            {"messages": [{"role": "user", "content": "q"}, TALK[1]], "images": []}]  # fmt: skip
    (folder / "swift.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "swift.jsonl", 1


def sharegpt(folder: Path) -> tuple[Path, int]:
    """With the system message in a column of its own."""
    write_pictures(folder, ["a.jpg", "b.jpg"])
    rows = [{"images": [name], "conversations": TALK, "system": "短"} for name in ("a.jpg", "b.jpg")]
    (folder / "share.json").write_text(json.dumps(rows))
    return folder / "share.json", 0


def sharegpt_parquet(folder: Path) -> tuple[Path, int]:
    """The same in a table whose text is read as bytes."""
    path, text = sharegpt(folder)
    pq.write_table(pa.Table.from_pylist(json.loads(path.read_text())), folder / "share.parquet")
    return folder / "share.parquet", text


def ms_swift_parquet(folder: Path) -> tuple[Path, int]:
    """By query, response and history."""
    write_pictures(folder, ["a.jpg", "b.jpg"])
    said = {"query": "颜色？", "response": "红", "history": [["<image>什么？", "猫"]], "system": "短"}
    pq.write_table(
        pa.Table.from_pylist([{"images": [n], **said} for n in ("a.jpg", "b.jpg")]), folder / "s.parquet"
    )
    return folder / "s.parquet", 0


def course(folder: Path) -> tuple[Path, int]:
    write_pictures(folder / "set/images", ["1.jpg", "2.jpg"])
    (folder / "set/labels_zh").mkdir()
    for number in (1, 2):
        (folder / f"set/labels_zh/{number}.json").write_text(json.dumps({"conversations": [SYSTEM, *TALK]}))
    return folder / "set", 0


def test_a_table_of_text_alone_is_mixed_in(vision: Path, world: Path, tmp_path: Path) -> None:
    """One row speaks of an image that is not there, which is no success."""
    lines = [{"messages": [SYSTEM, {"role": "user", "content": f"q{k}"}, TALK[1]]} for k in range(3)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"messages": TALK}])))
    flags = ("--data", tmp_path / "chat.jsonl", "--vision", vision, "--out", tmp_path / "chat")
    refused = call("extract", "run", *flags, code=1).one_line()
    assert refused.endswith("name it by --image-column, none for text without images")
    call("extract", "run", *flags, "--image-column", "none", "--max-failed", 0.25)
    shard = Shard(tmp_path / "chat/chat.h5")
    assert [Status(status).label for status in shard.status] == [*["text only"] * 3, "no file"]
    extracted(vision, llava_json(tmp_path / "seen")[0], tmp_path / "features")
    features = (tmp_path / "features", tmp_path / "chat")
    given = config(world, tmp_path / "run", **LORA, features=features, eval_features=None, mix="0.5,0.5")
    ended = call("train", "run", *flags_of(given))
    assert "chat 3 samples, 50.0% of those drawn" in ended.err


FORMS = [llava_json, ms_swift, ms_swift_parquet, sharegpt, sharegpt_parquet, course]


@pytest.mark.parametrize("form", FORMS)
def test_dialogues_of_each_form_are_extracted_and_trained_on(
    vision: Path, world: Path, tmp_path: Path, form: Any
) -> None:
    """Several questions about one picture are one sample, after the system message of the data."""
    data, text = form(tmp_path / "data")
    shard = extracted(vision, data, tmp_path / "features")
    dialogues = [shard.dialogue(row) for row in range(shard.rows)]
    assert sum(int(status == Status.TEXT_ONLY) for status in shard.status) == text
    assert {"短"} <= {dialogue.system for dialogue in dialogues}
    assert sum(dialogue.turns == (("什么？", "猫"), ("颜色？", "红")) for dialogue in dialogues) == 2
    assert all(len(dialogue.turns) for dialogue in dialogues)  # kept of rows without a picture, too
    given = config(world, tmp_path / "run", features=tmp_path / "features", eval_features=None)
    given = dataclasses.replace(given, tune="lora", epochs=8, instructions="auto")
    samples, _ = TrainingResources(given, weights=False).samples(given)
    examples = [samples.example(index, epoch=0) for index in range(len(samples))]
    decode = samples.conversation.tokenizer.decode
    assert ["短" in decode(example.ids) for example in examples] == [d.system == "短" for d in dialogues]
    for example, dialogue in zip(examples, dialogues, strict=True):
        learnt = decode([label for label in example.labels if label >= 0])
        assert [learnt.count(answer) for _, answer in dialogue.turns] == [1] * len(dialogue.turns)
    call("train", "run", *flags_of(given))
    models = ("--checkpoint", given.out / "last", "--llm", world / "llm", "--max-tokens", 2)
    asked = ("--features", tmp_path / "features", "--output", tmp_path / "answers.jsonl")
    call("infer", "batch", *models, *asked)
    asked_with = [line.get("system") for line in read_json_lines(tmp_path / "answers.jsonl")]
    assert asked_with == [dialogue.system for dialogue in dialogues]
    losses = list(curve(given.out).values())
    assert losses[-1] < losses[0] - 0.1
    if data.is_file() and not text:  # the same table as --text: the same words
        told = dataclasses.replace(given, text=str(data), out=tmp_path / "told")
        call("train", "run", *flags_of(told))
        assert curve(told.out) == curve(given.out)


def test_templates_without_a_system_role(world: Path, tmp_path: Path) -> None:
    write_talk(tmp_path / "told/t.h5", rows=4, text_only=0, system="短")
    given = config(world, tmp_path / "run", features=tmp_path / "told", eval_features=None, max_steps=1)
    refuses = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{%- endif %}"
    llm = write_language_model(tmp_path / "refuses", template=refuses + QWEN3_TEMPLATE)
    with pytest.raises(LlavaError, match="fails on a system message; got TemplateError: no system role"):
        train_run(dataclasses.replace(given, llm=llm))
    without = QWEN3_TEMPLATE[QWEN3_TEMPLATE.index("{%- set ns") :]
    llm = write_language_model(tmp_path / "drops", template=without)
    ended = call("train", "run", *flags_of(dataclasses.replace(given, llm=llm)))
    assert "the chat template writes no system messages" in ended.err
