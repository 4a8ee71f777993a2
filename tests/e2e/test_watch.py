"""`train watch`: what a browser shows of runs and sweeps while they train, and of what they leave."""

from __future__ import annotations

import contextlib
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import call, run, start, started, wait_until
from tests.support.devtools import Tab, browsing
from tests.support.llava_server import Served
from tests.support.runs import config, flags_of
from tests.support.sweeps import command, sweep

STATUS = "document.querySelector('header p').textContent"
STEP = f"Number(({STATUS}.match(/step ([0-9,]+)/) || [0, '-1'])[1].replaceAll(',', ''))"


@contextlib.contextmanager
def watching(folder: Path, *words: str, **environment: Any) -> Iterator[Served]:
    process = start("train", "watch", folder, "--port", 0, *words, **environment)
    try:
        served = Served(process)
        yield served
        served.stop()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with browsing(tmp_path / "profile") as tab:
        tab.call("Runtime.enable")
        tab.screen(1000, 900)
        yield tab


def test_a_run_is_seen_to_train_to_be_killed_and_to_go_on(world: Path, tmp_path: Path, tab: Tab) -> None:
    out = tmp_path / "run"
    endless = config(world, out, max_steps=100_000, epochs=100_000, save_every=5, eval_every=50, log_every=5)
    train = ("train", "run", *flags_of(endless))
    with started(*train) as first, contextlib.ExitStack() as stack:
        wait_until(first, (out / "metrics.jsonl").exists)
        watched = stack.enter_context(watching(out))
        tab.open(watched.base)
        tab.until(f"{STATUS}.startsWith('running') && {STATUS}.includes(' of 100,000 · ') && {STEP} > 0")
        step = tab.run(STEP)
        tab.until(f"{STEP} > {step}")
        tab.until("document.querySelectorAll('#curves svg[role=img]').length === 3")
        assert tab.run("at('samples').querySelector('dd').textContent") == "红色的圆形0"
        wait_until(first, (out / "last").exists)
        first.kill()
        first.wait()
        tab.until(f"{STATUS}.startsWith('killed: ')")
        with started(*train) as again:
            tab.until(f"{STATUS}.startsWith('running')")
            step = tab.run(STEP)
            tab.until(f"{STEP} > {step}")
            again.send_signal(signal.SIGINT)
            again.wait()
        tab.until(f"{STATUS}.startsWith('stopped')")
        watched.process.kill()
        tab.until(f"{STATUS} === say('offline')")
        stack.pop_all()


def test_the_trials_of_a_sweep_lie_over_each_other(world: Path, tmp_path: Path, tab: Tab) -> None:
    out = tmp_path / "sweep"
    run(*command(sweep(world, out, "lr=0.01,0.02", "weight_decay=0,1e38", eval_captions=2)))
    with watching(out) as watched:
        tab.open(watched.base)
        tab.until("document.querySelectorAll('#trials tbody tr').length === 4")
        assert tab.run(STATUS).startswith("2 finished · 2 failed · ")
        rows = "[...document.querySelectorAll('#trials tbody tr')].map((row) => row.innerText.split('\\t'))"
        first, diverged, second, _ = tab.run(rows)
        assert diverged[1:3] == ["lr=0.01 weight_decay=1e+38", "failed"]
        for k, row in ((0, first), (2, second)):
            summary = json.loads((out / f"trials/000{k}/summary.json").read_text())
            figures = [f"{summary[f'eval_{name}']:.4f}" for name in ("loss", "grounding_gap")]
            assert [*row[2:6], row[7]] == ["finished", "12", *figures, summary["verdict"]]
        for name in ("stroke", "stroke-dasharray"):
            lines = "[...document.querySelectorAll('#curves path[stroke]')]"
            assert len(set(tab.run(f"{lines}.map((line) => line.getAttribute('{name}'))"))) == 4
        tab.run("document.querySelectorAll('#trials button')[2].click()")
        verdict = "at('verdict-title').textContent"
        assert tab.run(verdict) == f"Verdict: {second[7]}"
        tab.run("document.querySelectorAll('#trials button')[1].click()")
        assert "the loss is nan at step " in tab.run(STATUS)
        tab.run("at('language').click()")
        assert tab.run(STATUS).startswith("2 次已完成 · 2 次失败 · ")
        assert tab.run("document.documentElement.lang") == "zh-CN"
        for dark in (False, True):
            tab.screen(390, 800, dark=dark, mobile=True)
            assert tab.run("document.documentElement.scrollWidth") <= 390
    with watching(out, "--lang", "zh") as watched:
        tab.open(watched.base)
        tab.until(f"{STATUS}.startsWith('2 finished · 2 failed · ')")  # the browser's language
        assert tab.run("document.querySelector('footer').textContent").startswith(
            "Served by train watch, llava-align "
        )


def test_torn_lines_wait_damaged_ones_are_counted_and_captions_are_no_html(tmp_path: Path, tab: Tab) -> None:
    answer = {
        "row": "a.h5:0",
        "question": "?",
        "written": "<img src=x>",
        "generated": "<b>bold</b>",
        "cut": False,
    }
    lines = [{"step": 0, "total_steps": 9}, {"step": 0, "eval_loss": 3.0, "eval_captions": [answer]}]
    metrics = tmp_path / "run/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.with_name("training_config.yaml").write_text("{}\n")  # which a run writes first
    with watching(metrics.parent, LC_ALL="zh_CN.UTF-8") as watched:
        tab.open(f"{watched.base}?vscodeBrowserReqId=1")
        tab.until(f"{STATUS}.startsWith('stopped')")
        assert "Served by train watch, llava-align " in tab.run(
            "document.querySelector('footer').textContent"
        )
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "lo')
        tab.until(f"{STATUS}.includes('step 0 of 9')")
        assert tab.run("[...document.querySelectorAll('#samples dd')].map((each) => each.textContent)") == [
            "<img src=x>",
            "<b>bold</b>",
        ]
        assert tab.run("document.querySelectorAll('#samples b, #samples img').length") == 0
        assert not tab.run(f"{STATUS}.includes('damaged')")
        with metrics.open("a") as file:
            file.write('ss": 2.5}\nnot JSON\n{"step": 1e999}\n{"step": 2, "loss": NaN}\n')
        tab.until(f"{STEP} === 2 && {STATUS}.endsWith('2 damaged lines left out')")
        assert "2.5000" in tab.run("document.querySelector('.totals').textContent")
        metrics.with_name("new").write_text(json.dumps({"step": 0, "eval_loss": 2.0}) + "\n")
        metrics.with_name("new").replace(metrics)  # as a run that continues drops later steps
        tab.until(f"{STEP} === 0 && document.querySelector('.totals').textContent.includes('2.0000')")


def test_curves_begin_where_the_run_began_and_count_what_is_beyond_them(tmp_path: Path, tab: Tab) -> None:
    told: list[dict[str, float]] = [{"step": 0, "eval_loss": 2.5}, {"step": 100, "eval_loss": 0.2}]
    told += [{"step": step, "loss": 1.5 if step == 10 else 0.2} for step in range(10, 110, 10)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in told))
    heights = """[...document.querySelector('#curves svg[role=img]').querySelectorAll('circle')].map(
        (point) => [point.textContent, Number(point.getAttribute('cy'))])"""
    caption = "document.querySelector('#curves figcaption').innerText"
    with watching(tmp_path) as watched:
        tab.open(watched.base)
        tab.until(f"{STEP} === 100")
        height = dict(tab.run(heights))
        assert height["step 0: 2.5000"] < height["step 10: 1.5000"] < height["step 100: 0.2000"]
        assert "above the edge" not in tab.run(caption)
        with metrics.open("a") as file:
            file.write('{"step": 110, "loss": 1e9}\n')
        tab.until(f"{STEP} === 110")
        assert "1 point above the edge" in tab.run(caption)
        height = dict(tab.run(heights))
        assert height["step 10: 1.5000"] < height["step 100: 0.2000"]


def test_only_this_machine_is_answered(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with watching(tmp_path) as watched:
        for headers, path, code in (({"Host": "evil.example"}, "", 403), ({}, "etc", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(watched.base + path, headers=headers))
            assert caught.value.code == code
        taken = call("train", "watch", tmp_path, "--port", watched.base.split(":")[-1].strip("/"), code=1)
        assert "is in use" in taken.one_line()
    nothing = call("train", "watch", tmp_path / "nix", code=2).one_line()
    assert "the --out of `train run`" in nothing
