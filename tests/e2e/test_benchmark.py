"""`infer benchmark`: the layouts of VLMEvalKit and lmms-eval, live and from a cache, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava_core.language.forced_choice import ranked, text_losses
from llava_core.shards.folder import open_shards
from llava_core.shards.other_words import with_words
from tests.support.aligned import Folders, write_aligned
from tests.support.benchmark_tasks import write_tsv
from tests.support.commands import Ended, call, largest_file
from tests.support.local_data import write_parquet
from tests.support.pictures import picture

PICTURES = [picture(seed) for seed in range(4)]
CHOICES: Sequence[Mapping[str, object]] = [
    {"index": 7, "image": PICTURES[0], "question": "What?", "hint": "Look.", "A": "a cat", "B": "a dog",
     "answer": "B", "category": "animal", "l2": "x"},
    {"index": 8, "image": "7", "question": "<image>\nWhich?", "A": "x", "B": "y", "C": "z", "answer": "C",
     "category": "letter", "l2": "y"},
    {"index": 9, "image": PICTURES[1], "question": "哪个？", "A": "红", "B": "蓝", "answer": "A",
     "category": "letter", "l2": "x"},
    {"index": 10, "image": PICTURES[2], "question": "Which?", "A": "x", "B": "y", "answer": "A",
     "category": "letter", "l2": "x"},
]  # fmt: skip
TASKS = {
    "choices.tsv": CHOICES,
    "named.tsv": [
        {"index": k, "image_path": f"{k}.jpg", "question": "Is it red?", "answer": ("Yes", "No")[k % 2]}
        for k in range(4)
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("benchmark"))


def write_task(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(PICTURES):
        (folder / f"{number}.jpg").write_bytes(data)
    if name.endswith(".tsv"):
        return write_tsv(folder / name, TASKS[name])
    image = [{"bytes": data, "path": f"{k}.jpg"} for k, data in enumerate(PICTURES)]
    layouts: dict[str, dict[str, Any]] = {
        "pope.parquet": {"question": ["Is it?"] * 4, "answer": ["yes", "no", "no", "yes"]},
        "textvqa.parquet": {"question": ["Brand?"] * 4, "answers": [["nokia"] * 3 + ["Nokia 3"] * 7] * 4},
        "gqa.parquet": {"question": ["What is it?"] * 4, "answer": ["cat", "no", "red", "yes"]},
        "scienceqa.parquet": {"question": ["Which?"] * 4, "choices": [["x", "y"]] * 4, "answer": [0, 1] * 2},
        "mmmu.parquet": {"question": ["Which?"] * 4, "options": ["['x', 'y', 'z']"] * 4, "answer": [*"ABCA"]},
        "seed.parquet": {
            "question": ["Which?"] * 4,
            **{f"choice_{letter}": [letter * 2] * 4 for letter in "abcd"},
            "answer": [*"ADCB"],
        },
        "mmbench.parquet": {
            "question": ["Which?"] * 4, "hint": ["nan"] * 4, "A": ["x"] * 4, "B": ["y"] * 4,
            "C": ["nan", "z", "nan", "z"], "D": ["nan"] * 4, "answer": [*"ACBA"], "category": [*"ppqq"],
        },
    }  # fmt: skip
    return write_parquet(folder / name, image=image, **layouts[name])


def benchmark(world: Folders, task: Path, *flags: object, code: int = 0) -> Ended:
    output = task.parent / "out.jsonl"
    given = (*world.flags, "--task", task, "--output", output, "--max-tokens", 6, "--json", *flags)
    if "--by" not in flags or "likelihood" in flags:
        given = tuple(flag for flag in given if flag not in ("--max-tokens", 6))
    return call("infer", "benchmark", *given, code=code)


def lines(task: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (task.parent / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_multiple_choice_by_likelihood_is_what_the_losses_say(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "choices.tsv")
    ended = benchmark(world, task)
    written = lines(task)
    prompts = ["Look.\nWhat?", "Which?", "哪个？", "Which?"]
    assert [line["prompt"] for line in written] == prompts
    assert [line["id"] for line in written] == ["7", "8", "9", "10"]
    aligned = world.aligned()
    pictures = [PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[2]]  # the second names the first by its index
    for line, own in zip(written, pictures, strict=True):
        visual = aligned.encode_files([own])[0]
        texts = [*line["options"].values()]
        choices = text_losses(aligned.llm, aligned.conversation, visual, line["prompt"], texts)
        assert line["losses"] == pytest.approx([choice.loss for choice in choices], rel=1e-4)
        assert line["prediction"] == [*line["options"]][ranked(choices)[0].index]
        assert line["correct"] == (line["prediction"] == line["answer"])
        assert line["shuffled"]["losses"] != line["losses"]
    summary = ended.summary
    assert (summary["kind"], summary["questions"], summary["judged"]) == ("multiple choice", 4, 4)
    assert summary["accuracy"] == sum(line["correct"] for line in written) / 4
    assert summary["accuracy_shuffled"] == sum(line["shuffled"]["correct"] for line in written) / 4
    assert summary["accuracy_gain"] == summary["accuracy"] - summary["accuracy_shuffled"]
    assert summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"]
    assert summary["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    assert [(each["category"], each["judged"]) for each in summary["categories"]] == [
        ("animal", 1), ("letter", 3)
    ]  # fmt: skip
    assert "letter" in ended.out
    before = (tmp_path / "out.jsonl").read_bytes()
    by_other = benchmark(world, task, "--category", "L2")  # asks nothing again
    assert [(each["category"], each["judged"]) for each in by_other.summary["categories"]] == [
        ("x", 3), ("y", 1)
    ]  # fmt: skip
    assert "→" not in by_other.err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_letters_are_asked_for_with_the_options_listed(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "choices.tsv")
    benchmark(world, task, "--options", "letters")
    first, _, chinese, _ = lines(task)
    listed = (
        "Look.\nWhat?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
    )
    assert first["prompt"] == listed
    assert chinese["prompt"].endswith("A. 红\nB. 蓝\n请直接回答选项的字母。")
    aligned = world.aligned()
    visual = aligned.encode_files([PICTURES[0]])[0]
    choices = text_losses(aligned.llm, aligned.conversation, visual, listed, ["A", "B"])
    assert first["losses"] == pytest.approx([choice.loss for choice in choices], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("choices.tsv", "multiple choice"), ("scienceqa.parquet", "multiple choice"),
        ("mmmu.parquet", "multiple choice"), ("seed.parquet", "multiple choice"),
        ("mmbench.parquet", "multiple choice"), ("named.tsv", "yes or no"), ("pope.parquet", "yes or no"),
        ("textvqa.parquet", "short answers"), ("gqa.parquet", "short answers"),
    ],
)  # fmt: skip
def test_every_layout_is_read_and_a_cache_gives_the_same_as_live_images(
    world: Folders, tmp_path: Path, name: str, kind: str
) -> None:
    task = write_task(tmp_path, name)
    live = benchmark(world, task).summary
    assert (live["kind"], live["judged"], live["failed"]) == (kind, 4, 0)
    assert live["by"] == ("generation" if kind == "short answers" else "likelihood")
    written = lines(task)
    call(
        "extract", "run", "--data", task, "--vision", world.vision, "--out", tmp_path / "f", "--device", "cpu"
    )
    (tmp_path / "out.jsonl").unlink()
    models = ("--checkpoint", world.checkpoint, "--llm", world.llm, "--device", "cpu")
    flags = ("--features", tmp_path / "f", "--task", task, "--output", tmp_path / "out.jsonl", "--json")
    assert call("infer", "benchmark", *models, *flags).summary == live
    for line, before in zip(lines(task), written, strict=True):
        for about in (line, line["shuffled"]), (before, before["shuffled"]):
            about[0].pop("losses", None), about[1].pop("losses", None)
        assert line == before


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("scienceqa.parquet", "ABAB"),
        ("mmmu.parquet", "ABCA"),
        ("seed.parquet", "ADCB"),
        ("mmbench.parquet", "ACBA"),
    ],
)
def test_the_right_option_is_known_by_letter_however_a_file_names_it(
    world: Folders, tmp_path: Path, name: str, letters: str
) -> None:
    task = write_task(tmp_path, name)
    benchmark(world, task)
    assert [line["answer"] for line in lines(task)] == [*letters]
    if name == "mmbench.parquet":
        assert [len(line["options"]) for line in lines(task)] == [2, 3, 2, 3]


def test_yes_and_no_have_the_figures_of_pope(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "pope.parquet")
    summary = benchmark(world, task, "--yes-no", "Yes.", "No.").summary
    written = lines(task)
    assert written[0]["options"] == {"yes": "Yes.", "no": "No."}
    said = [line["prediction"] for line in written]
    both = sum(a == b == "yes" for a, b in zip(said, ("yes", "no", "no", "yes"), strict=True))
    assert summary["yes_ratio"] == said.count("yes") / 4
    assert summary["recall"] == both / 2
    assert summary["precision"] == (both / said.count("yes") if "yes" in said else None)
    assert summary["f1"] == pytest.approx(2 * both / (said.count("yes") + 2))
    assert (summary["yes_ratio_of_answers"], summary["chance"]) == (0.5, 0.5)


def test_both_questions_about_a_picture_right_is_mme_s_accuracy_plus(world: Folders, tmp_path: Path) -> None:
    image = [{"bytes": PICTURES[k // 2], "path": "a.jpg"} for k in range(8)]
    columns = {"question": ["Is it?"] * 8, "answer": ["Yes", "No"] * 4}
    task = write_parquet(tmp_path / "mme.parquet", image=image, **columns)
    summary = benchmark(world, task).summary
    said = [line["prediction"] for line in lines(task)]  # the same twice about each picture
    assert (summary["accuracy"], summary["accuracy_plus"], summary["accuracy_plus_shuffled"]) == (0.5, 0, 0)
    (tmp_path / "out.jsonl").unlink()
    task = write_parquet(tmp_path / "mme.parquet", image=image, **columns | {"answer": said})
    assert benchmark(world, task).summary["accuracy_plus"] == 1
    assert "accuracy_plus" not in benchmark(world, write_task(tmp_path / "p", "pope.parquet")).summary


def test_images_in_a_table_of_their_own_are_found_by_id(world: Folders, tmp_path: Path) -> None:
    """As lmms-eval has GQA; the answers are those about the same questions with their images."""
    words = {"question": ["What is it?"] * 4, "answer": ["cat", "no", "red", "yes"]}
    together = [{"bytes": PICTURES[k], "path": "a.jpg"} for k in (2, 0, 2, 1)]
    whole = write_parquet(tmp_path / "whole/gqa.parquet", image=together, **words)
    expected = benchmark(world, whole, "--by", "generation").summary
    task = write_parquet(tmp_path / "gqa.parquet", imageId=["c", "a", "c", "b"], **words)
    stored = [{"bytes": data, "path": "a.jpg"} for data in PICTURES]
    write_parquet(tmp_path / "images/1.parquet", id=[*"ab"], image=stored[:2])
    images = write_parquet(tmp_path / "images/2.parquet", id=[*"cd"], image=stored[2:])
    flags = ("--by", "generation", "--images")
    got = benchmark(world, task, *flags, images.parent).summary
    assert {**got, "task": "", "output": ""} == {**expected, "task": "", "output": ""}
    (tmp_path / "out.jsonl").unlink()
    line = benchmark(world, task, *flags, images, code=1).one_line()
    assert line == f"error: --images {images}; expected all images of --task; got none with id a"
    line = benchmark(world, task, *flags, whole, code=1).one_line()
    assert "expected a table of columns id and image; got " in line
    line = benchmark(world, task, code=1).one_line()
    assert "got imageId, question, answer; give --images the table of its images, with columns" in line
    line = benchmark(world, task, *flags, tmp_path / "gone", code=1).one_line()
    assert line == f"error: no file or folder {tmp_path / 'gone'}; give --images another"


def test_generated_answers_are_read_and_an_interrupted_run_goes_on(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "textvqa.parquet")
    summary = benchmark(world, task, "--by", "generation").summary
    assert summary["max_tokens"] == 6
    assert {"vqa_accuracy", "exact_match", "vqa_accuracy_shuffled"} <= summary.keys()
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    first = json.loads(written.splitlines()[0])
    assert first["prompt"] == "Brand?\nAnswer the question using a single word or phrase."
    assert (first["correct"], first["vqa_accuracy"]) == (False, 0)
    (tmp_path / "out.jsonl").write_text(written[: written.index("\n") + 30], encoding="utf-8")  # torn
    assert benchmark(world, task, "--by", "generation").summary == summary
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == written
    other = benchmark(world, task, "--by", "generation", "--instruction", "", code=1).one_line()
    assert f"{tmp_path / 'out.jsonl'} holds something else" in other
    (tmp_path / "out.jsonl").unlink()
    task = write_task(tmp_path, "choices.tsv")
    summary = benchmark(world, task, "--by", "generation").summary
    assert {line["said"] for line in lines(task)}
    assert summary.get("unread", 0) == sum(line["prediction"] is None for line in lines(task))


def test_a_full_disk_names_the_file_and_the_run_goes_on(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "choices.tsv")
    with largest_file(700):
        *_, line = benchmark(world, task, code=1).err.splitlines()
    assert line == f"error: File too large: {tmp_path / 'out.jsonl'}"
    assert benchmark(world, task).summary["judged"] == len(CHOICES)


def test_an_image_that_does_not_decode_costs_its_own_questions(world: Folders, tmp_path: Path) -> None:
    rows = [dict(row) for row in CHOICES]
    rows[2]["image"] = b"\xff\xd8\xff" + bytes(200)  # begins as a JPEG does
    rows[3]["image"] = "gone.jpg"
    task = write_tsv(tmp_path / "t.tsv", rows)
    ended = benchmark(world, task, code=1)
    summary = ended.summary
    assert (summary["questions"], summary["failed"], summary["judged"]) == (4, 2, 2)
    assert f"4 questions, 2 without an answer: `error` in {tmp_path / 'out.jsonl'} tells why" in ended.err
    _, _, damaged, gone = lines(task)
    assert "as an image" in damaged["error"]
    assert f"no image file {tmp_path / 'gone.jpg'}" in gone["error"]
    rows[3]["image"] = str([PICTURES[0].hex()] * 2)
    task = write_tsv(tmp_path / "s/t.tsv", rows)
    benchmark(world, task, code=1)
    assert lines(task)[3]["error"] == "a question about several images; expected one"


def without(*names: str) -> list[dict[str, object]]:
    return [{name: value for name, value in row.items() if name not in names} for row in CHOICES]


@pytest.mark.parametrize(
    ("rows", "flags", "code", "message"),
    [
        ([], (), 1, "T has no rows"),
        (without("question"), (), 1, "T is no benchmark; expected columns image or image_path, question"),
        (without("image"), (), 1, "T is no benchmark; expected columns image or image_path, question"),
        (without("answer"), (), 1, "got index, image, question, hint, A, B, category, l2, C; lay it out as"),
        ([{**row, "answer": ""} for row in CHOICES], (), 1, "T has no answers; got an empty column"),
        (
            [*CHOICES[:3], {**CHOICES[3], "answer": "E"}], (), 1,
            "the answer in row 3 of T is none of its options; expected one of A, B, the text of one, or its",
        ),
        ([{**CHOICES[0], "B": ""}], (), 1, "row 0 of T; expected two options or more, and one answer; got"),
        (
            [{**row, "A": "1", "B": "0", "C": "", "answer": "0"} for row in CHOICES], (), 1,
            "the answers of T are both texts of options and numbers from 0; write letters, A for the first",
        ),
        ([{**CHOICES[0], "question": " "}], (), 1, "row 0 of T has no question"),
        (CHOICES, ("--category", "topic"), 2, "T has no column 'topic'; got index, image"),
        (CHOICES, ("--by", "likelihood", "--max-tokens", 3), 2, "--max-tokens; expected --by generation"),
        (CHOICES, ("--yes-no", "a", "b"), 2, "--yes-no; expected questions of yes or no"),
        (without("A", "B", "C"), ("--by", "likelihood"), 2, "--by likelihood for short answers; use --by"),
        (without("A", "B", "C"), ("--options", "texts"), 2, "--options texts; expected multiple choice; got"),
    ],
)  # fmt: skip
def test_what_is_no_benchmark_is_refused_in_one_line(
    world: Folders,
    tmp_path: Path,
    rows: list[dict[str, object]],
    flags: Sequence[object],
    code: int,
    message: str,
) -> None:
    task = write_tsv(tmp_path / "t.tsv", rows)
    given = (*world.flags, "--task", task, "--output", tmp_path / "out.jsonl", *flags)
    line = call("infer", "benchmark", *given, code=code).one_line()
    assert message in line.replace(str(task), "T")
    assert not (tmp_path / "out.jsonl").exists()


def test_questions_and_answers_are_dialogues_to_train_on(world: Folders, tmp_path: Path) -> None:
    """An option's text for its letter or number, and what most people said."""
    expected = {
        "choices.tsv": [("What?", "a dog"), ("Which?", "z"), ("哪个？", "红"), ("Which?", "x")],
        "scienceqa.parquet": [("Which?", word) for word in "xyxy"],
        "textvqa.parquet": [("Brand?", "Nokia 3")] * 4,
        "pope.parquet": [("Is it?", answer) for answer in ("yes", "no", "no", "yes")],
    }
    for name, turns in expected.items():
        task = write_task(tmp_path / name.split(".")[0], name)
        out = ("--out", task.parent / "f", "--vision", world.vision, "--device", "cpu")
        call("extract", "run", "--data", task, *out)
        (shard,) = open_shards(task.parent / "f")
        told = [shard.dialogue(row).turns for row in range(4)]
        assert told == [(turn,) for turn in turns]
        assert (shard.sha256[1] == shard.sha256[0]).all() == (name == "choices.tsv")
    rows = [{"id": 2, "question": "Any?", "answer": "B", "A": "no", "B": "some"}]
    words = write_tsv(tmp_path / "words.tsv", rows)
    (reworded,) = with_words(open_shards(tmp_path / "pope/f"), str(words))
    assert reworded.dialogue(0).turns == (("Any?", "some"),)


def test_features_of_another_file_are_refused(world: Folders, tmp_path: Path) -> None:
    task = write_task(tmp_path, "choices.tsv")
    out = ("--vision", world.vision, "--out", tmp_path / "f", "--device", "cpu")
    call("extract", "run", "--data", task, "--limit", 2, *out)
    models = ("--checkpoint", world.checkpoint, "--llm", world.llm, "--device", "cpu")
    flags = (*models, "--features", tmp_path / "f", "--output", tmp_path / "out.jsonl")
    line = call("infer", "benchmark", *flags, "--task", task, code=1).one_line()
    assert "expected one of 4 rows, made from this very file; got the first 2 rows; make it with" in line
    other = write_task(tmp_path, "pope.parquet")
    line = call("infer", "benchmark", *flags, "--task", other, code=1).one_line()
    assert "got choices.tsv of other bytes" in line
    line = call("infer", "benchmark", *flags, "--task", tmp_path / "*.p*", code=1).one_line()
    line = call("infer", "benchmark", *flags, "--task", f"{tmp_path}/*.[tp][sa]*", code=1).one_line()
    assert "expected files of one kind; got multiple choice and yes or no; name one of them" in line
