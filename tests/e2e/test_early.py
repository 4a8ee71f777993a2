"""What a user mistypes is said before torch is imported, and what a launcher leaves behind is said at all."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from extract.config import BenchConfig, RunConfig, VerifyConfig
from tests.support.aligned import write_aligned
from tests.support.commands import ENVIRONMENT, run
from tests.support.paths import ROOT

CHECK = """
import importlib, json, sys
from llava_core import gpu_drivers
from llava_core.cli import command as cli

gpu_drivers.DEVICE_FILES, gpu_drivers.LIBRARY = (), "none.so"  # as on a machine without a GPU
for module, *argv in json.loads(sys.argv[1]):
    try:
        cli.main(module, "", importlib.import_module(f"{module}.__main__").COMMANDS, argv)
    except SystemExit as left:
        assert left.code in (1, 2), (module, argv, left.code)
    heavy = {"torch", "transformers"} & set(sys.modules)
    assert not heavy, (module, argv, heavy)
"""


def test_a_mistyped_path_is_told_without_torch(tmp_path: Path) -> None:
    world = write_aligned(tmp_path)
    (tmp_path / "empty").mkdir()
    nix, empty = tmp_path / "nix", tmp_path / "empty"
    shard = tmp_path / "f/a.h5"
    shard.parent.mkdir()
    shard.touch()
    (tmp_path / "loop").symlink_to("loop")
    full = tmp_path / "full/a"
    full.parent.mkdir()
    full.touch()
    weights, gpu = world.checkpoint / "model.safetensors", ["--device", "cuda"]
    retry = ["extract", "retry-failed", "--vision", world.vision, "--out", shard.parent]
    no_gpu = "--device cuda; got no GPU that this torch can use; use --device cpu"
    models = ["--llm", world.llm, "--vision", world.vision]
    aligned = ["--checkpoint", world.checkpoint, *models]
    train = ["--llm", world.llm, "--out", nix]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[list[object], str]] = [
            (["train", "run", "--features", nix, *train], "no feature folder"),
            (["train", "run", "--features", empty, *train], "no finished shard"),
            (["train", "run", "--features", shard.parent, "--llm", nix, "--out", nix], "no language model"),
            (["train", "run", "--features", shard.parent, "--llm", empty, "--out", nix], "holds no language"),
            (["train", "run", "--features", shard, *train[:3], shard], "--out; expected a folder"),
            (["train", "run", "--features", shard, *train[:3], tmp_path / "loop"], "loop, a link to nothing"),
            (["train", "run", "--features", shard, *train, "--seed", 2**64], "--seed; expected 0 or more"),
            (["extract", "run", "--data", nix, "--vision", nix, "--out", nix, "--concurrency", 10**7],
             "--concurrency; expected up to 10,000; got 10,000,000"),
            (["train", "run", "--features", shard, *train, "--init", nix], "no checkpoint in"),
            (["train", "plan", "--features", shard, "--eval-features", nix, *train], "no feature folder"),
            (["train", "sweep", "--features", nix, "--eval-features", shard, *train, "--space", "lr=1"],
             "no feature folder"),
            (["train", "sweep", "--features", shard, "--eval-features", shard, *train, "--space", "lt=1"],
             "in --space; known: "),
            (["train", "sweep", "--features", shard, "--eval-features", shard, *train, "--space", "lr=a"],
             "--space lr; expected a number"),
            (["train", "eval", "--checkpoint", nix, "--features", shard, "--llm", nix], "no checkpoint in"),
            (["train", "eval", "--checkpoint", tmp_path / "run", "--features", shard, "--llm", nix],
             f"give {tmp_path / 'run/last'}"),
            (["infer", "ask", "--checkpoint", nix, *models, "--image", "a"], "no checkpoint in"),
            (["llava_align", "push", "--folder", nix, "--to", "hf", "--name", "a/b"], "no checkpoint in"),
            (["infer", "ask", *aligned, "--image", nix], "no image file"),
            (["infer", "ask", *aligned[:4], "--vision", nix, "--image", nix], "no vision folder"),
            (["infer", "ask", *aligned, "--image", empty], "no image file"),
            (["infer", "ask", *aligned, "--image", shard], "as an image: not an image"),
            (["infer", "chat", *aligned, "--image", nix], "no image file"),
            (["infer", "lens", *aligned, "--image", nix], "no image file"),
            (["infer", "lens", *aligned, "--image", world.llm / "config.json"], "as an image: not an image"),
            (["infer", "batch", *aligned, "--input", nix, "--output", nix], "no file"),
            (["infer", "batch", *aligned, "--input", shard, "--output", empty], "--output; expected a file"),
            (["infer", "serve", *aligned, "--port", port], f"port {port} of 127.0.0.1 is in use"),
            (["infer", "score", "--input", empty], "--input; expected a file; got the folder"),
            (["extract", "run", "--data", nix, "--vision", world.vision, "--out", nix], "no data at"),
            (["extract", "run", "--data", f"{nix}/*.parquet", "--vision", nix, "--out", nix], "no data at"),
            (["extract", "run", "--data", empty, "--vision", empty, "--out", nix], "holds no vision encoder"),
            (["extract", "retry-failed", "--vision", world.vision, "--out", nix], "no feature folder"),
            (["extract", "verify", "--vision", nix, "--out", shard], "no vision folder"),
            (["extract", "bench", "--data", nix, "--vision", nix], "no data at"),
            (["llava_align", "match", "--vision", nix, "--images", empty, "--text", "a"], "no vision folder"),
            (["llava_align", "match", "--vision", world.vision, "--images", nix, "--text", "a"], "no folder"),
            (["llava_align", "trace", "--checkpoint", nix], "no checkpoint in"),
            (["llava_align", "export", "--checkpoint", nix, *models, "--out", nix], "no checkpoint in"),
            (["llava_align", "import", "--file", nix, *models, "--out", nix], "no file"),
            (["llava_align", "chat-llm", "--llm", nix], "no language model folder"),
            (["llava_align", "examples", "--data", nix, "--out", nix], "no data at"),
            (["train", "run", "--features", shard, *train, *gpu], no_gpu),
            (["train", "run", "--features", shard, *train, "--device", "mps"], "got no Apple GPU"),
            (["train", "eval", *aligned[:4], "--features", shard, *gpu], no_gpu),
            (["extract", "run", "--data", full.parent, *models[2:], "--out", nix, *gpu], no_gpu),
            (["extract", "verify", *models[2:], "--out", shard, *gpu], no_gpu),
            (["infer", "ask", *aligned, "--image", world.images[0], *gpu], no_gpu),
            (["infer", "score", "--input", shard, *models[2:], *gpu], no_gpu),
            (["llava_align", "trace", *gpu], no_gpu),
            (["llava_align", "chat-llm", *models[:2], *gpu], no_gpu),
            (["extract", "run", "--data", full.parent, *models[2:], "--out", nix, "--images", nix],
             "no image folder"),
            ([*retry, "--status", "sunny"], "unknown failure 'sunny'; expected one of bad-url"),
            ([*retry, "--status", "bad-caption"], "--status; expected what another try can correct"),
            (["llava_align", "match", *models[2:], "--images", empty, "--text", "a"], "no images in .*; "),
            (["llava_align", "import", "--file", weights, *models, "--out", empty], "is there already; "),
            (["llava_align", "export", *aligned, "--out", full.parent], "exists; expected a new or empty"),
            (["llava_align", "demo-stage2", "--out", empty], "holds no finished demo of this version"),
            (["llava_align", "push", "--folder", world.checkpoint, "--to", "hf", "--name", "a/b"],
             "no token for Hugging Face; set HF_TOKEN, or run: hf auth login"),
        ]  # fmt: skip
        argv = json.dumps([[str(word) for word in words] for words, _ in cases])
        command = [sys.executable, "-c", CHECK, argv]
        environment = {**ENVIRONMENT, "HF_TOKEN": "", "HF_HOME": str(empty)}
        ended = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
        )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == len(cases), ended.stderr
    for line, (words, expected) in zip(lines, cases, strict=True):
        assert line.startswith("error: "), (words, line)
        assert re.search(expected, line), (words, line)


def test_a_device_that_this_process_does_without_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"answer": "a cat", "caption": "a cat"}\n')
    run("infer", "score", "--input", tmp_path / "a.jsonl", "--device", "mps", code=0)
    paths: dict[str, Any] = {"data": "a", "vision": tmp_path, "out": tmp_path}
    assert RunConfig(**paths, device="cuda", ray="auto").own_device == "auto"  # its workers have the GPUs
    assert RunConfig(**paths, device="cuda").own_device == "cuda"
    assert VerifyConfig(out=tmp_path, device="cuda").own_device == "auto"
    assert BenchConfig(features=tmp_path, device="cuda").own_device == "auto"


def test_a_world_that_no_torchrun_made_is_no_reason_for_silence(tmp_path: Path) -> None:
    for name, content in (
        ("run/config.json", "{}"),
        ("llm/config.json", '{"model_type": "llama"}'),
        ("a.h5", ""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    flags = ("--checkpoint", tmp_path / "run", "--features", tmp_path / "a.h5", "--llm", tmp_path / "llm")
    line = run("train", "eval", *flags, code=1, WORLD_SIZE=2).one_line()
    assert "cannot join the 2 processes that WORLD_SIZE promises" in line
    assert "`unset WORLD_SIZE RANK`" in line
