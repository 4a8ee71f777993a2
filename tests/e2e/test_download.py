"""`llava download`: ModelScope's client against a server that speaks its API."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_align.hub.config import DownloadConfig
from llava_align.hub.download import DATA
from llava_core.errors import LlavaError
from tests.support.commands import Ended, call, run, started, wait_until
from tests.support.distributions import without
from tests.support.model_scope import ModelScope, model_scope
from tests.support.paths import ROOT

LARGE = os.urandom(6_000_000)
PARQUET = {f"data/train-{i:05d}-of-00166.parquet": bytes([i]) * (i + 1) for i in range(166)}
REPOSITORIES = {
    "iic/multi-modal_clip-vit-base-patch16_zh": {"config.json": b"{}", "weights/pytorch_model.bin": b"clip"},
    "Qwen/Qwen3-0.6B": {"config.json": b"{ }", "model.safetensors": LARGE},
    DATA: {"README.md": b"# SA1B", **PARQUET},
}
IMPATIENT: dict[str, Any] = {
    "MODELSCOPE_API_MAX_RETRIES": 1,
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": 1,
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": 1,
}


@pytest.fixture
def hub() -> Iterator[ModelScope]:
    with model_scope(REPOSITORIES) as hub:
        yield hub


def download(hub: ModelScope, out: Path, *arguments: object, code: int = 0) -> Ended:
    command = ("llava_align", "download", *arguments, "--out", out, "--json")
    return run(*command, code=code, MODELSCOPE_ENDPOINT=hub.url)


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    hidden = [path for path in paths if any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path not in hidden}


def test_models_continue_after_an_interruption(hub: ModelScope, tmp_path: Path) -> None:
    hub.stall = "model.safetensors"
    large = tmp_path / "models/qwen3"

    def half_done() -> bool:
        return any(path.stat().st_size > 1_000_000 for path in large.rglob("*") if path.is_file())

    with started(
        "llava_align", "download", "models", "--out", tmp_path, MODELSCOPE_ENDPOINT=hub.url
    ) as process:
        wait_until(process, half_done)
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command continues" in err
    assert "Qwen/Qwen3-0.6B *" in out

    hub.stall = None
    hub.asked.clear()
    ended = download(hub, tmp_path, "models")
    assert files(tmp_path / "models/clip") == REPOSITORIES["iic/multi-modal_clip-vit-base-patch16_zh"]
    assert files(large) == REPOSITORIES["Qwen/Qwen3-0.6B"]
    (asked,) = [span for path, span in hub.asked if path == "model.safetensors"]
    assert asked is not None
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 1_000_000
    assert "weights/pytorch_model.bin" not in dict(hub.asked)
    assert ended.summary["next"] == f"python -m llava_align download train --out {tmp_path}"


def test_data_lands_where_the_next_command_reads_it(hub: ModelScope, tmp_path: Path) -> None:
    planned = download(hub, tmp_path, "train", "--dry-run")
    assert planned.summary["missing"] == planned.summary["bytes"] == sum(range(1, 101))
    assert not list(tmp_path.iterdir())
    ended = download(hub, tmp_path, "eval")
    wanted = {path: content for path, content in PARQUET.items() if "train-0010" in path}
    assert len(wanted) == 10
    assert files(tmp_path / "sa1b-eval") == wanted
    command = f"extract run --vision {tmp_path}/models/clip --data {tmp_path}/sa1b-eval --limit 2000"
    assert command in ended.out
    one = download(hub, tmp_path, "train", "--include", "data/train-00007*")
    assert list(files(tmp_path / "sa1b")) == ["data/train-00007-of-00166.parquet"]
    assert one.summary["bytes"] == 8


def test_what_it_cannot_do_is_one_line(hub: ModelScope, tmp_path: Path) -> None:
    error = download(hub, tmp_path, "train", "--include", "data/nowhere*", code=1).one_line()
    assert f"no file of {DATA} is called data/nowhere*" in error
    hub.claimed["model.safetensors"] = 10**18
    error = download(hub, tmp_path, "models", code=1).one_line()
    assert "too little space" in error
    assert "expected 909494.7 TiB free" in error
    assert not hub.asked
    nowhere = run(
        "llava_align", "download", "models", "--out", tmp_path, code=1,
        MODELSCOPE_ENDPOINT="http://127.0.0.1:9", **IMPATIENT,
    )  # fmt: skip
    assert "got [Errno 111] Connection refused; check the network" in nowhere.one_line()
    assert "asking http://127.0.0.1:9 what there is (a minute or more, if nothing answers)" in nowhere.err
    path = f"{without(tmp_path / 'without', 'modelscope')}:{ROOT}"
    error = run("llava_align", "download", "eval", "--out", tmp_path, code=1, PYTHONPATH=path).one_line()
    assert error.endswith("downloading needs ModelScope's client; pip install modelscope")


@pytest.mark.parametrize("name", ["data/../../train-x", "data/train-\x1b[31m", "data/train-\u202e"])
def test_a_file_that_would_land_elsewhere_is_refused(
    hub: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Client:
        endpoint = hub.url

        def get_dataset_files(self, *_: object, **__: object) -> list[dict[str, object]]:
            return [{"Path": name, "Size": 1}]

    monkeypatch.setattr("llava_align.hub.download.open_modelscope", lambda doing: Client())
    line = call(
        "llava_align", "download", "train", "--out", tmp_path, "--include", "data/*", code=1
    ).one_line()
    assert "has a file that would land elsewhere" in line
    assert "\x1b" not in line


def test_what_the_network_has_no_part_in(hub: ModelScope, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LlavaError, match=r"--out; expected a folder; got the file .*/file$"):
        DownloadConfig(what="models", out=tmp_path / "file/below")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/clip").touch()
    there = download(hub, tmp_path, "models", code=1).one_line()
    assert "models/clip" in there
    assert "the network is not at fault; correct that on this disk" in there
    hub.odd = True
    odd = download(hub, tmp_path, "models", code=1).one_line()
    assert "the network is not at fault (AttributeError); try another version of the hub's client" in odd
    assert "check the network" not in there + odd
