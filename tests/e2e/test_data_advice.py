"""What `extract` says of rows that failed, what it advises, and what `train` says of rows left out."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from aiohttp import web

from tests.support.commands import Ended, call
from tests.support.language_models import write_language_model
from tests.support.local_data import CAPTIONS, NAMES, extract, words, write_parquet
from tests.support.servers import answer, serving


def test_the_advice_is_what_helps(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    with serving({"/a.jpg": answer(pictures[0])}) as base:
        data = write_parquet(tmp_path / "x.parquet", url=[f"{base}/a.jpg"], caption=["a"])
        ended = extract(vision, data, code=3)
        call(*again(ended), "--device", "cpu")
        assert words(data) == ["a"]


def again(ended: Ended) -> list[str]:
    """The arguments of the command that the advice gives."""
    (line,) = [line for line in ended.err.splitlines() if "to try again: " in line]
    return shlex.split(line.partition("to try again: python -m ")[2])


def test_the_advice_keeps_the_flags_that_were_needed(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    """A later 403 of a private host: without --allow-private no request would go out."""
    served = False

    async def own_pages_only(request: web.Request) -> web.Response:
        allowed = request.headers.get("Referer") == "http://album.example/"
        return web.Response(body=pictures[0], status=200 if allowed and served else 403)

    with serving({"/a.jpg": own_pages_only}) as base:
        data = write_parquet(tmp_path / "x.parquet", url=[f"{base}/a.jpg"], caption=["a"])
        ended = extract(vision, data, "--allow-private", code=3)
        assert "HTTP 401 or 403: the host may want --referer ADDRESS or --header NAME:VALUE" in ended.err
        refused = call(*again(ended), "--referer", "http://album.example/", "--device", "cpu", code=3)
        assert refused.err.rstrip().endswith("--allow-private with the same --referer")
        served = True
        call(*again(ended), "--referer", "http://album.example/", "--device", "cpu")
        assert words(data) == ["a"]


def test_failed_files_are_named(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "cut.jpg").write_bytes(pictures[0][:-20])
    names = ["a.jpg", "cut.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "b.jpg"]
    data = write_parquet(tmp_path / "x.parquet", image=names, caption=[*"abcdef", None])
    lines = ["no file: 1.jpg, 2.jpg, 3.jpg, …", "truncated: cut.jpg", "bad caption: b.jpg"]
    ended = extract(vision, data, code=3)
    assert ended.summary["failed_files"]["truncated"] == {"cut.jpg": 1}
    inspected = call("extract", "inspect", "--out", tmp_path / "features")
    for line in lines:
        assert line in ended.err.splitlines()
        assert line in inspected.out.splitlines()


def test_retry_failed_refuses_what_cannot_help(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    data = write_parquet(tmp_path / "x.parquet", image=[NAMES, ["a.jpg"]], caption=CAPTIONS)
    extract(vision, data, code=3)
    retry = ("extract", "retry-failed", "--out", tmp_path / "features", "--vision", vision, "--device", "cpu")
    for flag, value, expected in (
        ("--fit", "pad", "squash"),
        ("--layer", "-2", "None"),
        ("--decode", "exact", "draft"),
    ):
        refused = call(*retry, flag, value, code=2).one_line()
        line = f"error: {flag}; expected {expected}, as the shards have it; got {value}; leave it out"
        assert refused == line
    refused = call(*retry, "--status", "several-images", code=2).one_line()
    assert "change these rows in --data, where 'several images' lies" in refused
    assert words(data) == ["several images", "a dog"]


def test_training_tells_of_text_only_rows_and_its_loss(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(map(json.dumps, [{"image": "a.jpg", "messages": talk}, {"messages": talk}])))
    page = tmp_path / "page.html"
    extract(vision, data)
    call("extract", "inspect", "--out", tmp_path / "features", "--html", page)
    assert '<rect class="text"' in page.read_text()
    assert 'class="bad"' not in page.read_text()
    assert 'data-outcome="text only" class=none' in page.read_text()
    llm = write_language_model(tmp_path / "llm")
    ended = call("train", "run", "--features", tmp_path / "features", "--llm", llm, "--out", tmp_path / "run")
    assert "1 row without an image left out: they train the language model (--tune lora, llm)" in ended.err
    assert re.search(r"^finished 1 steps; loss \d+\.\d{4} at the last$", ended.err, re.MULTILINE)
