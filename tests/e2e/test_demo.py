"""`llava demo`: the whole job through the public commands, and whether what it says is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.lens import measure
from llava_align.config import DemoConfig
from llava_align.demo import command as demo
from llava_align.demo.contact_sheet import wrapped
from tests.support.commands import ENVIRONMENT, call
from tests.support.distributions import without


def test_the_projector_makes_the_language_model_see(site: Path, tmp_path: Path) -> None:
    """The demo as `make demo` runs it: what is asked of it, it must reach.

    Without a checkout, from the wheel, and without the packages that only a download and wandb need.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "llava_align", "demo", "--out", str(tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": f"{without(tmp_path / 'without', 'modelscope', 'wandb')}:{site}"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert figures["right_picture"]["all"] >= 0.9
    for attribute, share in figures["chance"].items():
        assert figures["shuffled_picture"][attribute] == pytest.approx(share, abs=0.06)
    assert figures["rows"] == {
        "ok": 2394 + 128,
        "http 4xx": 3,
        "timeout": 1,
        "truncated": 1,
        "not an image": 1,
    }
    assert figures["grounding_gap_high"] > figures["grounding_gap"] > figures["grounding_gap_low"] > 1
    assert {"shape", "colour", "place", "size", "all"} == figures["right_picture"].keys()
    assert figures["loss_after"] < 0.2 * figures["loss_before"]
    for command in ("extract run", "train run", "train eval", "infer ask", "infer batch"):
        assert f"$ python -m {command} " in ended.stdout
    words = measure(tmp_path / "out", pictures=24)
    assert words["trained, input embeddings"]["shape or colour"] > 0.8
    assert words["random, input embeddings"]["shape or colour"] < 0.3
    for name in ("loss.png", "answers.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 400


def test_no_line_of_an_answer_begins_with_a_mark() -> None:
    assert wrapped("左上角有圆，右边有方。", 5) == ["左上角有圆，", "右边有方。"]
    assert wrapped("左上角有圆", 2) == ["左上", "角有", "圆"]


def test_a_demo_too_small_for_its_dead_links_is_refused(tmp_path: Path) -> None:
    flags = ("--out", tmp_path / "out", "--rows", 15)
    line = call("llava_align", "demo", *flags, code=2).one_line()
    assert line == "error: --rows; expected 16 or more; got 15"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_smallest_demo_ends_well(tmp_path: Path) -> None:
    flags = ("--out", tmp_path / "out", "--rows", 16, "--held-out", 2, "--steps", 2, "--json")
    assert call("llava_align", "demo", *flags).summary["rows"]["ok"] == 12


def test_an_interrupt_says_what_it_means_for_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the interrupted command's own line, which says that it continues."""

    def interrupted(config: DemoConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_demo", interrupted)
    line = call("llava_align", "demo", "--out", tmp_path, code=130).one_line()
    assert line == "error: interrupted; unlike its commands, the demo begins anew next time"


def test_it_replaces_its_own_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "holds something else" in call("llava_align", "demo", "--out", tmp_path, code=1).one_line()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    line = call("llava_align", "demo", "--out", tmp_path / "thesis.tex", code=2).one_line()
    assert line.startswith("error: --out; expected a folder; got the file ")
