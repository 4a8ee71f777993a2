"""`llava demo`: the public commands, one after the other, on the built-in world.

The demo itself only draws the pictures, serves them, and scores the answers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from extract.config import RunConfig
from llava_align.config import MODELS, DemoConfig
from llava_align.demo.folder import MARK, clear
from llava_align.demo.world.captions import ATTRIBUTES, accuracy, chance, shuffled
from llava_align.demo.world.dataset import Split, write_split
from llava_align.demo.world.server import TROUBLES, serve
from llava_align.subprocess_command import imports_shared, run_command
from llava_core.bootstrap import with_interval
from llava_core.cli.command import INTERRUPTED
from llava_core.cli.console import show, table
from llava_core.cli.translation import translated, translated_label
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.language.instructions import QUESTION
from llava_core.types import JsonDict

BATCH_SIZE = 16


def run(config: DemoConfig) -> JsonDict:
    """Print every command with its output, and a table of results; returns its figures."""
    try:
        with imports_shared():
            return _demo(config)
    except KeyboardInterrupt:
        what = "interrupted; unlike its commands, the demo begins anew next time"
        raise LlavaError(what, exit_code=INTERRUPTED) from None
    except ImportError as error:
        raise LlavaError(f"the demo draws with {error.name}", do="pip install 'llava-align[plots]'") from None


def _demo(config: DemoConfig) -> JsonDict:
    from llava_align.demo.contact_sheet import contact_sheet, loss_curve

    out = config.out
    clear(out)
    made = {name: getattr(config, name) for name in ("rows", "held_out", "seed")}
    (out / MARK).write_text(json.dumps(made) + "\n")
    started = time.monotonic()
    with serve(out / "pictures") as url:
        train = write_split(out, "train", url, config.rows, files=2, seed=config.seed, odd=TROUBLES)
        held_out = write_split(out, "held-out", url, config.held_out, files=1, seed=config.seed)
        drawing = time.monotonic() - started
        show(
            translated(f"{config.rows + config.held_out} pictures drawn in {drawing:.0f} s, served at {url}")
        )
        figures = _commands(config, train, held_out, url)
    answers = [line["answer"] for line in read_json_lines(out / "answers.jsonl")]
    # An answer depends on picture and question alone: another picture's answer is that to a shuffled picture.
    figures["right_picture"] = accuracy(held_out.scenes, answers)
    figures["shuffled_picture"] = accuracy(held_out.scenes, shuffled(held_out.scenes, answers))
    figures["chance"] = chance(held_out.scenes, random.Random(config.seed))
    metrics = read_json_lines(out / "run/metrics.jsonl")
    evaluations = [line for line in metrics if "eval_loss" in line]
    for name, line in (("loss_before", evaluations[0]), ("loss_after", evaluations[-1])):
        figures |= {f"{name}{end}": line[f"eval_loss{end}"] for end in ("", "_low", "_high")}
    loss_curve(metrics, out / "loss.png")
    contact_sheet(held_out, answers, out / "answers.png")
    figures["seconds"] = {"draw": drawing, **figures["seconds"], "all": time.monotonic() - started}
    _print(figures, out)
    return figures


def _commands(config: DemoConfig, train: Split, held_out: Split, url: str) -> JsonDict:
    """Run the public commands; returns figures from their summaries, and the seconds each phase took."""
    out, vision, llm = config.out, MODELS / "vision", MODELS / "llm"
    features = [out / "features" / split.parquet.name for split in (train, held_out)]
    seconds: dict[str, float] = {}
    accepted = max(RunConfig.max_failed, len(TROUBLES) / config.rows)

    def command(phase: str, *arguments: object) -> JsonDict:
        began = time.monotonic()
        summary = run_command(*arguments)
        seconds[phase] = seconds.get(phase, 0) + time.monotonic() - began
        return summary

    extracted = [
        command(
            "extract",
            *("extract", "run", "--data", split.parquet, "--out", folder, "--vision", vision),
            *("--allow-private", "--timeout", 4, "--retries", 1),
            *(("--max-failed", f"{accepted:.3f}") if accepted > RunConfig.max_failed else ()),
        )
        for split, folder in zip((train, held_out), features, strict=True)
    ]
    command(
        "train",
        *("train", "run", "--features", features[0], "--eval-features", features[1]),
        *("--llm", llm, "--out", out / "run", "--batch-size", BATCH_SIZE, "--max-steps", config.steps),
        *("--epochs", math.ceil(config.steps * BATCH_SIZE / extracted[0]["ok"])),
        *("--eval-every", 100, "--save-every", 200, "--seed", config.seed),
        *(("--report-to", "tensorboard") if importlib.util.find_spec("tensorboard") else ()),
    )
    trained = ("--checkpoint", out / "run/last", "--llm", llm)
    evaluated = command("eval", "train", "eval", *trained, "--features", features[1])
    picture = f"{url}/held-out/{held_out.pictures[0].name}"
    models = (*trained, "--vision", vision)
    command("ask", "infer", "ask", *models, "--image", picture, "--prompt", QUESTION)
    questions = [{"image": str(path.resolve()), "prompt": QUESTION} for path in held_out.pictures]
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in questions]
    (out / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    command(
        "batch",
        *("infer", "batch", *models, "--batch-size", 64),
        *("--input", out / "questions.jsonl", "--output", out / "answers.jsonl"),
    )
    by_status: dict[str, int] = {}
    for summary in extracted:
        for label, n in summary["by_status"].items():
            by_status[label] = by_status.get(label, 0) + n
    gap = {name: value for name, value in evaluated.items() if name.startswith("grounding_gap")}
    return {"rows": by_status, **gap, "seconds": seconds}


def _print(figures: JsonDict, out: Path) -> None:
    seconds = figures["seconds"]
    rows: list[tuple[Any, ...]] = [(f"rows: {label}", n) for label, n in figures["rows"].items()]
    rows += [(f"seconds: {phase}", f"{value:.1f}") for phase, value in seconds.items()]
    rows += [
        ("held-out loss before training", with_interval(figures, "loss_before", 3)),
        ("held-out loss after training", with_interval(figures, "loss_after", 3)),
        ("grounding gap (loss with shuffled pictures - loss)", with_interval(figures, "grounding_gap", 3)),
    ]
    show("\n" + table(rows))
    named = [
        (
            translated_label(attribute),
            *(f"{figures[key][attribute]:.1%}" for key in ("right_picture", "shuffled_picture", "chance")),
        )
        for attribute in (*ATTRIBUTES, "all")
    ]
    show(
        "\n"
        + table(named, ("attributes named rightly", "right picture", "shuffled picture", "another's caption"))
    )
    show(translated(f"\n{out / 'loss.png'}     the loss curve"))
    show(translated(f"{out / 'answers.png'}  held-out images and answers"))
    if (out / "run/tensorboard").exists():
        found = shutil.which("tensorboard") is not None  # `make demo` runs in no activated environment
        program = Path("tensorboard") if found else Path(sys.executable).with_name("tensorboard")
        show(translated(f"{program} --logdir {out / 'run'}  shows the curves in a browser"))
