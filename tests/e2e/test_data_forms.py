"""Data as tools and people write it, through `extract run`: words, columns, formats, and what is no data."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web
from PIL import Image

from extract.config import RunConfig
from extract.extract_shards import open_shard
from extract.sources.find import find_sources
from llava_core.row_status import Status
from llava_core.shards.reader import Shard
from llava_core.vision.open import open_vision_tower
from tests.support.commands import Ended, call
from tests.support.language_models import write_language_model
from tests.support.local_data import llava, write_json, write_parquet, write_pictures
from tests.support.servers import answer, serving
from tests.support.vision_encoders import write_vision_folder

NAMES = ["a.jpg", "b.jpg"]
CAPTIONS = ["一只猫", "a dog"]
DIALOGUE = [{"role": "user", "content": "<image>什么？"}, {"role": "assistant", "content": "猫"}]


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_folder(tmp_path_factory.mktemp("vision"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[bytes]:
    return write_pictures(tmp_path, NAMES)


def extract(vision: Path, data: object, *flags: object, code: int = 0) -> Ended:
    out = Path(str(data)).parent / "features"
    given = ("--data", data, "--vision", vision, "--out", out, "--device", "cpu", "--json", *flags)
    ended = call("extract", "run", *given, code=code)
    assert len(ended.err) < 5000
    assert "JFIF" not in ended.out + ended.err
    return ended


def words(data: object, name: str | None = None) -> list[Any]:
    """Words of the rows that are ok, and labels of the others, in the only shard or the one of this name."""
    folder = Path(str(data)).parent / "features"
    (path,) = folder.glob(f"{name or '*'}.h5")
    shard = Shard(path)
    return [
        shard.caption(row) if status == Status.OK else Status(status).label
        for row, status in enumerate(shard.status.tolist())
    ]


def turns(*answers: str) -> str:
    return json.dumps([[None, answer] for answer in answers], ensure_ascii=False, separators=(",", ":"))


WORDS: dict[str, tuple[list[Any], list[str | None]]] = {
    "list": ([["一只猫", "a cat"], ["a dog"]], [turns("一只猫", "a cat"), turns("a dog")]),
    "struct": ([{"global_caption": text, "other": 1} for text in CAPTIONS], list(CAPTIONS)),
    "struct of another key": ([{"caption": text, "n": 1} for text in CAPTIONS], list(CAPTIONS)),
    "json text": ([json.dumps({"global_caption": text}) for text in CAPTIONS], list(CAPTIONS)),
    "json list": ([json.dumps([text]) for text in CAPTIONS], list(CAPTIONS)),
    "doubly encoded": (
        [json.dumps(json.dumps({"global_caption": text})) for text in CAPTIONS],
        list(CAPTIONS),
    ),
    "quoted": ([json.dumps(text) for text in CAPTIONS], list(CAPTIONS)),
    "python": ([str({"global_caption": text}) for text in CAPTIONS], list(CAPTIONS)),
    "parts": ([[{"type": "text", "text": text}] for text in CAPTIONS], list(CAPTIONS)),
    "bytes": ([text.encode() for text in CAPTIONS], list(CAPTIONS)),
    "dialogue": ([DIALOGUE, DIALOGUE], ['[["什么？","猫"]]'] * 2),
    "dialogue as text": ([json.dumps(DIALOGUE)] * 2, ['[["什么？","猫"]]'] * 2),
    "one is missing": ([None, "a dog"], [None, "a dog"]),
    "like json": (["[1] 猫", '{"a'], ["[1] 猫", '{"a']),
}


@pytest.mark.parametrize("kind", list(WORDS))
def test_words_of_every_kind_are_taken(
    vision: Path, tmp_path: Path, pictures: list[bytes], kind: str
) -> None:
    values, expected = WORDS[kind]
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=values)
    extract(vision, data, code=3 if None in expected else 0)
    assert words(data) == [text if text is not None else "bad caption" for text in expected]


def test_a_map_is_an_object(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    maps = pa.array([[("zh", "猫"), ("en", "cat")]] * 2, pa.map_(pa.string(), pa.string()))
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, text=maps)
    refused = extract(vision, data, code=1).one_line()
    assert "x.parquet: column 'text' has no words that can be read" in refused
    assert "give --caption-key one of zh, en" in refused
    assert not (tmp_path / "features").exists()
    extract(vision, data, "--caption-key", "zh")
    assert words(data) == ["猫", "猫"]


@pytest.mark.parametrize(
    ("values", "got"),
    [([1, 2], "got int 1"), ([{"zh": "猫"}] * 2, "got dict {zh: '猫'}"), ([[1.5], [2.5]], r"got list [1.5]"),
     (['{"zh": "猫"}'] * 2, "got dict {zh: '猫'}"), ([{"raw": b"\x89PNG" * 99}] * 2, "{raw: 396 bytes}")],
)  # fmt: skip
def test_words_that_are_none_are_refused_before_anything_is_written(
    vision: Path, tmp_path: Path, pictures: list[bytes], values: list[Any], got: str
) -> None:
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, cap_seg=values)
    line = extract(vision, data, code=1).one_line()
    assert "column 'cap_seg' has no words that can be read" in line
    assert got in line
    assert ("give --caption-key one of zh" in line) == ("zh" in got)
    assert not (tmp_path / "features").exists()


def test_mended_words_are_taken_without_encoding_again(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, [*NAMES, "c.jpg"])
    names = [*NAMES, "c.jpg"]
    data = write_parquet(tmp_path / "x.parquet", image=names, caption=["old", None, "kept"])
    ended = extract(vision, data, code=3)
    assert "1 row without words: mend them in --data, and the same command takes them" in ended.err
    assert "retry-failed" not in ended.err
    before = Shard(tmp_path / "features/x.h5")
    write_parquet(data, image=names, caption=["new", "mended", "kept"])
    ended = extract(vision, data)
    assert "the words of 2 rows changed; its images are not encoded again" in ended.err
    assert words(data) == ["new", "mended", "kept"]
    after = Shard(tmp_path / "features/x.h5")
    np.testing.assert_array_equal(after.read(0), before.read(0))
    assert ended.summary["stages"]["encode"]["busy"] >= 0
    assert not list(tmp_path.glob("features/*.part"))
    assert "nothing to do" in extract(vision, data).err


def test_mending_words_keeps_what_is_there(vision: Path, tmp_path: Path) -> None:
    """Features of an image that is gone since, thumbnails, and the number type."""
    write_pictures(tmp_path, NAMES)
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", "older"])
    extract(vision, data, "--thumbnails", "--dtype", "int8")
    before = Shard(tmp_path / "features/x.h5")
    kept = before.read(1), before.thumbnail(1), int(before.mtime[1])
    (tmp_path / "b.jpg").unlink()
    write_parquet(data, image=NAMES, caption=["new", "newer"])
    assert "holds features as int8; expected --dtype float16" in extract(vision, data, code=1).one_line()
    extract(vision, data, "--dtype", "int8")
    assert words(data) == ["new", "newer"]
    after = Shard(tmp_path / "features/x.h5")
    np.testing.assert_array_equal(after.read(1), kept[0])
    assert (after.thumbnail(1), int(after.mtime[1])) == kept[1:]
    picture = Image.new("RGB", (40, 40), (0, 200, 0))
    picture.save(tmp_path / "a.jpg")
    write_parquet(data, image=NAMES, caption=["newest", "newer"])
    extract(vision, data, "--dtype", "int8")
    assert not np.array_equal(Shard(tmp_path / "features/x.h5").read(0), after.read(0))


def test_a_mend_that_was_killed_is_finished_by_the_same_command(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path, NAMES)
    data = write_parquet(tmp_path / "x.parquet", image=NAMES, caption=["old", None])
    extract(vision, data, code=3)
    write_parquet(data, image=NAMES, caption=[None, "mended"])
    (source,) = find_sources(str(data))
    tower = open_vision_tower(vision)
    config = RunConfig(data=str(data), out=tmp_path / "features", vision=vision, device="cpu")
    open_shard(tmp_path / "features/x.h5", source, tower, config).close()  # as if killed here
    retry = ("extract", "retry-failed", "--out", tmp_path / "features", "--vision", vision, "--device", "cpu")
    line = call(*retry, code=1).one_line()
    assert "x.h5 is being made again, with other words; let `extract run` finish that first" in line
    extract(vision, data, code=3)
    assert words(data) == ["bad caption", "mended"]


def test_retrying_knows_data_and_layer(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    (tmp_path / "b.jpg").unlink()
    write_parquet(tmp_path / "x.parquet", image=NAMES, words=CAPTIONS)
    extract(
        vision, tmp_path / "x.parquet", "--text-column", "words", "--layer", -2, "--decode", "exact", code=3
    )
    (tmp_path / "b.jpg").write_bytes(pictures[1])
    retry = ("extract", "retry-failed", "--out", tmp_path / "features", "--vision", vision, "--device", "cpu")
    call(*retry)
    assert words(tmp_path / "x.parquet") == CAPTIONS


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
        assert refused.err.rstrip().splitlines()[-2].endswith("--allow-private with the same --referer")
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
    assert "1 row about no image left out (text only)" in ended.err.splitlines()
    assert re.search(r"^finished 1 steps; loss \d+\.\d{4} at the last$", ended.err, re.MULTILINE)


def image_values(kind: str, pictures: list[bytes]) -> Any:
    coded = [base64.b64encode(content).decode() for content in pictures]
    kinds: dict[str, Callable[[], Any]] = {
        "large": lambda: pa.array(pictures, pa.large_binary()),
        "dictionary": lambda: pa.array(pictures, pa.dictionary(pa.int32(), pa.binary())),
        "list of one": lambda: [[content] for content in pictures],
        "structs in lists": lambda: [[{"bytes": content, "path": "x"}] for content in pictures],
        "base64": lambda: coded,
        "wrapped": lambda: ["\n".join(text[i : i + 76] for i in range(0, len(text), 76)) for text in coded],
        "base64 bytes": lambda: [text.encode() for text in coded],
        "data url": lambda: [f"data:image/jpeg;base64,{text}" for text in coded],
        "paths in lists": lambda: [[name] for name in NAMES],
        "openai": lambda: [{"url": name} for name in NAMES],
    }
    return kinds[kind]()


IMAGE_KINDS = ("large", "dictionary", "list of one", "structs in lists", "base64", "wrapped", "base64 bytes",
               "data url", "paths in lists", "openai")  # fmt: skip


@pytest.mark.parametrize("kind", IMAGE_KINDS)
@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_images_of_every_kind_are_taken(
    vision: Path, tmp_path: Path, pictures: list[bytes], kind: str, form: str
) -> None:
    values = image_values(kind, pictures)
    data = tmp_path / f"x.{form}"
    table = pa.table({"pic": values, "TEXT": CAPTIONS, "KEY": ["k", "l"]})
    if form == "parquet":
        pq.write_table(table, data)
    elif form == "arrow":
        with pa.OSFile(str(data), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif isinstance(table.to_pylist()[0]["pic"], bytes) or "bytes" in str(table.schema.field("pic").type):
        pytest.skip("JSON has no bytes")
    elif kind in ("list of one", "base64 bytes"):
        pytest.skip("JSON has no bytes")
    else:
        data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()))
    extract(vision, data, "--image-column", "pic")
    assert words(data) == CAPTIONS
    shard = Shard(tmp_path / "features/x.h5")
    assert [shard.id(row) for row in range(2)] == ["k", "l"]
    assert not any("base64" in url or len(url) > 40 for url in shard.urls())


def test_arrow_types_without_a_place_in_parquet(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    size = max(map(len, pictures))
    fixed = pa.array([content.ljust(size, b"\0") for content in pictures], pa.binary(size))
    for name, column in {"fixed": fixed, "view": pa.array(pictures, pa.binary_view())}.items():
        data = tmp_path / name / "data-00000-of-00001.arrow"
        data.parent.mkdir()
        table = pa.table({"image": column, "text": CAPTIONS})
        with pa.OSFile(str(data), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        write_json(data.parent / "dataset_info.json", {"features": {}})
        write_json(data.parent / "state.json", {"_data_files": []})
        extract(vision, data.parent, "--out", tmp_path / name / "features")
        assert words(data) == CAPTIONS


def test_several_images_in_one_row_are_a_failure_with_a_name(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    data = tmp_path / "x.jsonl"
    rows = [{"images": NAMES, "messages": DIALOGUE}, {"images": ["a.jpg"], "messages": DIALOGUE},
            {"images": [], "messages": [{"role": "user", "content": "q"}, DIALOGUE[1]]},
            {"images": [], "messages": DIALOGUE},
            {"images": [], "messages": [{"role": "user", "content": "<video>q"}, DIALOGUE[1]]}]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, rows)))
    ended = extract(vision, data, code=3)
    assert words(data) == ["several images", '[["什么？","猫"]]', "text only", "no file", "no file"]
    assert ended.summary["failed"] == 3
    assert "1 row about several images: a row may have one" in ended.err


def test_rows_of_one_file_may_name_their_image_and_words_differently(
    vision: Path, tmp_path: Path, pictures: list[bytes]
) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"image": "a.jpg", "conversations": talk}, {"images": ["b.jpg"], "messages": talk},
            {"image_path": "a.jpg", "caption": "c"}, {"image": {"file": "b.jpg"}, "conversations": talk},
            {"conversations": talk}, {"image": "a.jpg", "captions": ["x", "", "y"]}]  # fmt: skip
    data = tmp_path / "x.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    extract(vision, data, code=3)
    dialogue = '[["q","a"]]'
    assert words(data) == [dialogue, dialogue, turns("c"), "no file", "text only", turns("x", "y")]


def ms_swift(folder: Path) -> Path:
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"query": "什么？", "response": "猫", "history": [["q", "a"]], "images": ["a.jpg"]},
            {"query": "<image>什么", "response": "狗", "images": ["b.jpg"], "history": history}]  # fmt: skip
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "x.jsonl"


def sharegpt(folder: Path) -> Path:
    return write_json(
        folder / "x.json", [llava(name, "q", text) for name, text in zip(NAMES, CAPTIONS, strict=True)]
    )


def comma_separated(folder: Path) -> Path:
    with (folder / "x.csv").open("w", newline="", encoding="gb18030") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "caption"), ("a.jpg", "一只猫，\n坐着"), ("b.jpg", 'a "dog"')])
    return folder / "x.csv"


def tab_separated(folder: Path) -> Path:
    (folder / "x.tsv").write_text("URL\tTEXT\na.jpg\t一只猫\nb.jpg\ta dog\n", encoding="utf-8-sig")
    return folder / "x.tsv"


def compressed(folder: Path) -> Path:
    rows = [{"image": name, "caption": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return folder / "x.jsonl.gz"


def json_lines_named_json(folder: Path) -> Path:
    rows = [{"image": name, "caption": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "x.json").write_text("\n".join(map(json.dumps, rows)))
    return folder / "x.json"


def image_folder(folder: Path) -> Path:
    rows = [{"file_name": name, "text": text} for name, text in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def beside(folder: Path) -> Path:
    (folder / "a.caption").write_text("一只猫")
    (folder / "b.jpg.txt").write_text("a dog")
    return folder


def course(folder: Path) -> Path:
    (folder / "set/images").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (folder / name).rename(folder / f"set/images/{number}.jpg")
        write_json(folder / f"set/labels_zh/{number}.json", DIALOGUE)
    return folder / "set"


def web_dataset(folder: Path) -> Path:
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for name, text in zip(NAMES, CAPTIONS, strict=True):
            stem = name.removesuffix(".jpg")
            notes = json.dumps({"caption": "not this", "url": "http://127.0.0.1:9/x"}).encode()
            for suffix, content in (
                ("json", notes),
                ("jpg", (folder / name).read_bytes()),
                ("txt", text.encode()),
            ):
                member = tarfile.TarInfo(f"deep/{stem}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "00000.tar"


def img2dataset_tars(folder: Path) -> Path:
    web_dataset(folder)
    write_parquet(folder / "00000.parquet", url=["http://127.0.0.1:9/x"] * 2, caption=["no"] * 2)
    write_json(folder / "00000_stats.json", {"count": 2})
    return folder


def img2dataset_files(folder: Path) -> Path:
    (folder / "00000").mkdir()
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (folder / name).rename(folder / "00000" / name)
        (folder / "00000" / name).with_suffix(".txt").write_text(text)
        write_json(
            (folder / "00000" / name).with_suffix(".json"), {"caption": text, "url": "http://127.0.0.1:9/x"}
        )
    write_parquet(folder / "00000.parquet", url=["http://127.0.0.1:9/x"] * 2, caption=["no"] * 2)
    return folder


FORMS: list[tuple[Callable[[Path], Path], list[str]]] = [
    (ms_swift, ['[["q","a"],["什么？","猫"]]', '[["q","a"],["什么","狗"]]']),
    (sharegpt, ['[["q","一只猫"]]', '[["q","a dog"]]']),
    (comma_separated, ["一只猫，\n坐着", 'a "dog"']),
    (tab_separated, CAPTIONS),
    (compressed, CAPTIONS),
    (json_lines_named_json, CAPTIONS),
    (image_folder, CAPTIONS),
    (beside, CAPTIONS),
    (course, ['[["什么？","猫"]]'] * 2),
    (web_dataset, CAPTIONS),
    (img2dataset_tars, CAPTIONS),
    (img2dataset_files, CAPTIONS),
]


@pytest.mark.parametrize(("write", "expected"), FORMS, ids=[write.__name__ for write, _ in FORMS])
def test_formats_of_other_tools(
    vision: Path, tmp_path: Path, write: Callable[[Path], Path], expected: list[str]
) -> None:
    folder = tmp_path / "data"
    write_pictures(folder, NAMES)
    data = write(folder)
    ended = extract(vision, data, "--out", tmp_path / "features")
    (path,) = (tmp_path / "features").glob("*.h5")
    assert [Shard(path).caption(row) for row in range(2)] == expected
    assert ended.summary["ok"] == 2
    if "img2dataset" in write.__name__:
        assert "the pictures of 1 table are on this disk; they are not downloaded" in ended.err
    elif write is comma_separated:
        assert "is not UTF-8; it is read as GB 18030" in ended.err
    else:
        assert "left out" not in ended.err


@pytest.mark.parametrize(
    ("files", "expected", "left_out"),
    [
        (["v1.0/22.05.jpg", "v1.0/22.05.txt", "v1.0/22.06.jpg", "v1.0/22.06.txt"], ["05", "06"], ""),
        (["7.input.jpg", "8.input.jpg", "7.output.txt", "8.output.txt"], ["output", "output"], ""),
        (["7.jpg", "7.seg.png", "7.txt", "7.cls"], ["7"], "1 seg.png"),
        (["7.jpg", "7.txt", "8.jpg"], ["7", "bad caption"], ""),
    ],
)
def test_names_in_tar_archives(
    vision: Path, tmp_path: Path, files: list[str], expected: list[str], left_out: str
) -> None:
    (content,) = write_pictures(tmp_path, ["a.jpg"])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in files:
            text = name.rpartition("/")[2].removesuffix(".txt").rpartition(".")[2].encode()
            data = content if name.endswith(("jpg", "png")) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    ended = extract(vision, tmp_path / "x.tar", code=3 if "bad caption" in expected else 0)
    assert words(tmp_path / "x.tar") == expected
    assert left_out in ended.err


def test_equal_names_in_two_folders_do_not_collide(vision: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_pictures(tmp_path / "set" / split, NAMES)
        write_parquet(
            tmp_path / "set" / split / "data.parquet", image=NAMES, caption=[f"{split} {n}" for n in NAMES]
        )
    extract(vision, tmp_path / "set")
    assert words(tmp_path / "set", "train-data") == ["train a.jpg", "train b.jpg"]
    assert words(tmp_path / "set", "test-data") == ["test a.jpg", "test b.jpg"]
    shard = tmp_path / "features/train-data.h5"
    shard.rename(shard.with_name("data.h5"))
    line = extract(vision, tmp_path / "set", code=1).one_line()
    assert "data.h5 was made when only one file was called data.parquet; rename it" in line


def test_what_is_left_out_of_a_folder_is_said(vision: Path, tmp_path: Path) -> None:
    names = ["a.jfif", "b.jpe", "c", "d.heic", "e.heic", "f.mp4"]
    for name, content in zip(names, write_pictures(tmp_path / "set", names), strict=True):
        if name in ("d.heic", "e.heic"):
            (tmp_path / "set" / name).write_bytes(b"\0\0\0\x18ftypheic" + content)
    for name, kind in (("g.tif", "TIFF"), ("h.avif", "AVIF")):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "set" / name, kind)
    for stem in "abcdefgh":
        (tmp_path / f"set/{stem}.txt").write_text(stem)
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == ["a", "b", "c", "g", "h"]
    (line,) = [line for line in ended.err.splitlines() if "left out" in line]
    assert "2 .heic, 3 .txt, 1 .mp4 left out" in line or "3 .txt, 2 .heic, 1 .mp4 left out" in line


def test_every_row_of_json_is_checked_before_anything_is_written(vision: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "set", NAMES)
    rows = [llava("a.jpg", "q", "a")] * 300
    write_json(tmp_path / "set/x.json", rows)
    strange = {"image": "a.jpg", "conversations": [{"from": "tool", "value": "x"}]}
    write_json(tmp_path / "set/y.json", [*rows, strange])
    line = extract(vision, tmp_path / "set", code=1).one_line()
    assert "y.json, row 300: unknown role 'tool'" in line
    assert not (tmp_path / "features").exists()


def test_tables_that_are_left_out_are_said(vision: Path, tmp_path: Path) -> None:
    """Beside images with their words, notes that are no tables; beside parquet files, other tables."""
    write_pictures(tmp_path / "set", NAMES)
    for name, text in zip(NAMES, CAPTIONS, strict=True):
        (tmp_path / "set" / name).with_suffix(".txt").write_text(text)
    write_json(tmp_path / "set/info.json", {"classes": ["cat", "dog"]})
    (tmp_path / "set/log.csv").write_text("step,loss\n1,2\n")
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set") == CAPTIONS
    assert "2 files of data left out, such as info.json; give --data the name of one" in ended.err
    write_parquet(tmp_path / "set/x.parquet", image=NAMES, caption=["x", "y"])
    ended = extract(vision, tmp_path / "set")
    assert words(tmp_path / "set", "x") == ["x", "y"]
    assert "2 files of data left out" in ended.err


@pytest.mark.parametrize(
    ("head", "line"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a pointer of Git LFS, not the file itself",
        ),
        (b"PARE" + bytes(99), "an encrypted parquet file"),
        (b"Rar!\x1a\x07\x00" + bytes(99), "a RAR archive"),
        (b"PK\x03\x04" + bytes(99), "a ZIP archive"),
        (gzip.compress(bytes(257) + b"ustar" + bytes(999)), "a compressed tar archive"),
        (b"<!DOCTYPE html><html>", "an HTML or XML page, as failed downloads leave"),
        (b"PAR1" + bytes(99), "is not a readable parquet file"),
        (b"ARROW1" + bytes(99), "is not a readable Arrow file"),
        (bytes(257) + b"ustar" + bytes(999), "is a damaged tar archive"),
        (b"\x00\x01" * 50, "is no table"),
    ],
    ids=["lfs", "encrypted", "rar", "zip", "tar.gz", "html", "parquet", "arrow", "tar", "bytes"],
)
def test_files_that_are_something_else_are_named(
    vision: Path, tmp_path: Path, head: bytes, line: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(head)
    assert line in extract(vision, tmp_path / "x.parquet", code=1).one_line()


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.csv", b'image,caption\na.jpg,"unclosed\nb.jpg,x\n', "is no CSV; got unexpected end of data"),
        ("x.csv", b"image,caption,caption\na.jpg,x,y\n", "more than one column 'caption'"),
        ("x.csv", b"image,caption\na.jpg,x,y\n", "line 2; expected 2 fields; got 3"),
        (
            "x.JSONL",
            b'{"image": "a.jpg", "caption": ' + b"[" * 700 + b"]" * 700 + b"}",
            "no words that can be",
        ),
        (
            "x.json",
            b'[{"image": "a.jpg", "conversations": [{"from": "' + b"r" * 5000 + b'"}]}]',
            "unknown role",
        ),
        ("x.csv", b"image,caption\n\"b'/9j/" + b"A" * 3000 + b"'\",x\n", "none of the images that"),
    ],
    ids=["quotes", "twice", "fields", "deep", "role", "bytes as text"],
)
def test_damaged_tables_are_one_short_line(
    vision: Path, tmp_path: Path, pictures: list[bytes], name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused = extract(vision, tmp_path / name, code=1).one_line()
    assert line in refused
    assert len(refused) < 700


def test_archives_that_are_not_whole(vision: Path, tmp_path: Path) -> None:
    archive = web_dataset_of(tmp_path / "set")
    whole = archive.read_bytes()
    archive.write_bytes(whole + whole)
    assert "damaged, or two in one file" in extract(vision, archive, code=1).one_line()
    archive.write_bytes(whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512))
    assert "has no end mark: samples may be missing from its end" in extract(vision, archive).err


def web_dataset_of(folder: Path) -> Path:
    write_pictures(folder, NAMES)
    return web_dataset(folder)


def test_columns_that_are_not_there(vision: Path, tmp_path: Path, pictures: list[bytes]) -> None:
    data = write_parquet(tmp_path / "x.parquet", pic=NAMES, words=CAPTIONS)
    lines = [
        extract(vision, data, code=1).one_line(),
        extract(vision, data, "--image-column", "pic", code=1).one_line(),
        extract(vision, data, "--image-column", "picture", code=1).one_line(),
    ]
    assert (
        "lacks the images; expected a column url, image, path, …; got pic, words; name it by --image-column"
        in lines[0]
    )
    assert "lacks the words" in lines[1]
    assert "name it by --text-column" in lines[1]
    assert "has no column 'picture'; got pic, words; correct --image-column" in lines[2]
    extract(vision, data, "--image-column", "pic", "--text-column", "words", "--id-column", "words")
    assert words(data) == CAPTIONS
