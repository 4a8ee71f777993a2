"""`llava examples`: pictures and captions as files."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from aiohttp import web

from extract.sources.folder import Folder
from tests.support.commands import call, run, started, wait_until
from tests.support.local_data import write_parquet
from tests.support.pictures import picture
from tests.support.servers import answer, serving


def test_the_first_that_can_be_had_are_saved_with_their_captions(base: str, tmp_path: Path) -> None:
    urls = [f"{base}/{name}" for name in ("0.jpg", "gone", "page", "3.jpg", "4.jpg", "5.jpg", "6.jpg")]
    captions = ["红色的圆形", "gone", "a page", None, "four", "five", "six"]
    data = write_parquet(tmp_path / "data/part.parquet", url=urls, caption=captions)
    command = ("llava_align", "examples", "--data", data, "--allow-private", "--json")
    ended = run(*command, "--out", tmp_path / "out", "--count", 3)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert saved == {
        "0000.jpg": picture(0),
        "0000.txt": "红色的圆形\n".encode(),
        "0001.jpg": picture(4),
        "0001.txt": b"four\n",
        "0002.jpg": picture(5),
        "0002.txt": b"five\n",
    }
    assert ended.summary["failed"] == {"http 4xx": 1, "not an image": 1}
    assert "holds something already" in call(*command, "--out", tmp_path / "out", code=1).one_line()
    assert "no data at none" in call(*command[:3], "none", "--out", tmp_path / "new", code=1).one_line()
    assert not (tmp_path / "new").exists()
    line = call(*command[:4], "--out", data / "new", code=2).one_line()
    assert line == f"error: --out; expected a folder; got the file {data}"
    again = call("llava_align", "examples", "--data", tmp_path / "out", "--out", tmp_path / "again", "--json")
    assert again.summary["examples"] == 3


def test_dialogues_and_several_captions_are_saved_as_json(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(picture(n))
    talk = [{"role": "user", "content": "什么？"}, {"role": "assistant", "content": "猫"}]
    rows = [
        {"image": "0.jpg", "messages": talk},
        {"messages": talk},
        {"image": "1.jpg", "messages": ["一", "b"]},
        {"image": ["0.jpg", "1.jpg"], "messages": talk},
        {"image": "2.jpg", "messages": "one"},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    ended = call("llava_align", "examples", "--data", data, "--out", tmp_path / "out", "--json")
    assert ended.summary["failed"] == {"text only": 1, "several images": 1}
    out = tmp_path / "out"
    assert json.loads((out / "0000.json").read_text()) == talk
    assert json.loads((out / "0001.json").read_text()) == ["一", "b"]
    assert (out / "0002.txt").read_text() == "one\n"
    columns = Folder.find(out).read()
    assert columns.captions == ['[["什么？","猫"]]', '[[null,"一"],[null,"b"]]', '[[null,"one"]]']


def test_rows_without_captions_are_said(tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "a.parquet", url=["http://127.0.0.1/a.jpg"], caption=[None])
    ended = call("llava_align", "examples", "--data", data, "--out", tmp_path / "out", code=1)
    assert ended.one_line() == f"error: no row of {data} has a caption"


def test_a_dead_network_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and never listens
        urls = [f"http://127.0.0.1:{closed.getsockname()[1]}/{n}" for n in range(1000)]
        data = write_parquet(tmp_path / "data/part.parquet", url=urls, caption=["x"] * len(urls))
        command = ("llava_align", "examples", "--data", data, "--out", tmp_path / "out", "--allow-private")
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:80")
        ended = call(*command, "--count", 100, code=1)
    assert ended.one_line() == (
        "error: no answer for 64 rows in a row: the network seems down; got 64 connect; check the network; "
        "HTTPS_PROXY is set, but images are asked for without a proxy"
    )
    assert not list((tmp_path / "out").iterdir())


def test_rows_without_a_picture_end_it_with_what_was_found(tmp_path: Path) -> None:
    asked = 0

    async def gone(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(status=404)

    with serving({"/0.jpg": answer(picture(0)), "/{n}": gone}) as base:
        urls = [f"{base}/0.jpg", *(f"{base}/{n}" for n in range(1000))]
        data = write_parquet(tmp_path / "data/part.parquet", url=urls, caption=["x"] * len(urls))
        command = ("llava_align", "examples", "--data", data, "--out", tmp_path / "out", "--allow-private")
        ended = call(*command, "--count", 2, code=1)
    assert "gave up after 207 rows in a row without an image; got 207 http 4xx" in ended.one_line()
    assert asked == 207
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.jpg", "0000.txt"]


def test_the_same_command_begins_anew_after_an_interrupt_or_a_kill(base: str, tmp_path: Path) -> None:
    urls = [f"{base}/{name}" for name in ("0.jpg", *["slow"] * 20)]
    data = write_parquet(tmp_path / "data/part.parquet", url=urls, caption=["x"] * len(urls))
    out = tmp_path / "out"
    command = ("llava_align", "examples", "--data", data, "--out", out, "--allow-private", "--count")
    for signum in (signal.SIGINT, signal.SIGKILL):
        with started(*command, 2) as process:
            wait_until(process, lambda: list(out.glob(".part/*.jpg")))
            os.killpg(process.pid, signum)
            err = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGKILL), err
        assert [path.name for path in out.iterdir()] == ([] if signum == signal.SIGINT else [".part"])
    write_parquet(data, url=urls[:1], caption=["x"])  # which nobody has to wait for
    call(*command, 2)
    assert sorted(path.name for path in out.iterdir()) == ["0000.jpg", "0000.txt"]
