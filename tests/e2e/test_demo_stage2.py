"""`llava demo-stage2`: after a small demo, the language model learns dialogues that stage 1 cannot answer."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.stage2 import markdown
from llava_align.demo.world.dataset import split_scenes
from llava_core.filesystem import read_json_lines
from tests.support.commands import call


def test_stage_2_answers_what_stage_1_does_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    call("llava_align", "demo", "--out", out, "--rows", 64, "--held-out", 8, "--steps", 10)
    ended = call("llava_align", "demo-stage2", "--out", out, "--tune", "llm", "--steps", 30, "--json")
    figures = json.loads(ended.out.splitlines()[-1])
    before, after = figures["before"], figures["after"]
    assert before["asked"] == after["asked"]
    assert "\ncounting and comparing take more steps: --steps 1200\n" in ended.out
    shown = [share for kind, share in before["right"].items() if "no-picture" not in kind]
    assert max(shown) < 0.2  # their wording is new to the language model
    assert after["right"]["zh yes-no"] > before["right"]["zh yes-no"] + 0.2
    assert after["text_loss"] > before["text_loss"]  # texts of another kind are forgotten
    for command in ("extract run", "train run --recipe stage2", "train eval", "infer batch"):
        assert f"$ python -m {command} " in ended.out
    assert markdown({"stage 1": before, "llm": after}).count("\n") == 2 + len(before["asked"]) + 2
    answers = read_json_lines(out / "stage2/after.jsonl")
    assert {line["id"].partition(" ")[2] for line in answers} >= {"zh count", "en where", "en chained"}
    captions = json.loads((out / ".llava-demo").read_text())
    assert len(split_scenes("train", captions["rows"], captions["seed"])) == 64


def test_it_needs_a_demo(tmp_path: Path) -> None:
    line = call("llava_align", "demo-stage2", "--out", tmp_path, code=1).one_line()
    assert "holds no finished demo of this version" in line
    assert f"python -m llava_align demo --out {tmp_path}" in line
