"""`infer serve --features`: answers about stored rows, with no encoder and no image."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from infer.serve.stored_rows import StoredRows
from llava_core.errors import LlavaError
from llava_core.shards.folder import open_shards
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import run
from tests.support.features import DEAD, write_features
from tests.support.llava_server import Served, llava_server

TEXT = "图中有什么？"
TOKENS = 12
TORN = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_aligned(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def features(world: Folders) -> Path:
    """Two shards of the same rows, so that ids are no names; in the second, row TORN is damaged."""
    write_features(world, world.llm.parent / "features/one.h5")
    path = write_features(world, world.llm.parent / "features/two.h5")
    stored, data = open_shards(path)[0].read(TORN).tobytes(), path.read_bytes()
    assert data.count(stored) == 1
    path.write_bytes(data.replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))
    return path.parent


def asked(served: Served, url: str, text: str = TEXT) -> Any:
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    with openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0, timeout=60) as client:
        return client.chat.completions.create(
            model="run/last", messages=[{"role": "user", "content": content}], max_tokens=TOKENS
        )


def answers_of_batch(world: Folders, features: Path, folder: Path) -> dict[tuple[str, int], str]:
    """What `infer batch` answers about the same rows."""
    models = ("--checkpoint", world.checkpoint, "--llm", world.llm, "--device", "cpu", "--max-tokens", TOKENS)
    output = ("--prompt", TEXT, "--output", folder / "a.jsonl")
    run("infer", "batch", *models, "--features", features, *output, code=1)  # of the damaged row
    lines = [json.loads(line) for line in (folder / "a.jsonl").read_text("utf-8").splitlines()]
    return {(line["shard"], line["row"]): line["answer"] for line in lines if "answer" in line}


def refused(served: Served, url: str) -> str:
    with pytest.raises(openai.BadRequestError) as raised:
        asked(served, url)
    assert raised.value.code == "invalid_image_url"
    return str(raised.value.message)


def test_rows_are_asked_about_without_an_encoder(world: Folders, features: Path, tmp_path: Path) -> None:
    expected = answers_of_batch(world, features, tmp_path)
    models = ("--checkpoint", world.checkpoint, "--llm", world.llm, "--device", "cpu")
    with llava_server(*models, "--features", features) as served:
        for (shard, row), answer in expected.items():
            assert asked(served, f"row:{shard}/{row}").choices[0].message.content.strip() == answer
        with pytest.raises(openai.InternalServerError, match="damaged") as damaged:
            asked(served, f"row:two.h5/{TORN}")
        assert damaged.value.code == "damaged_row"
        again = asked(served, "row:one.h5/2").usage
        assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1
        assert "no such row" in refused(served, "row:one.h5/5")
        assert "such as row:one.h5/0" in refused(served, "row:three.h5/0")
        assert "'c', the id of 2 rows" in refused(served, "row:c")
        assert f"row {DEAD} of two.h5 has no features" in refused(served, f"row:two.h5/{DEAD}")
        image = base64.b64encode(world.images[0].read_bytes()).decode()
        assert "this server has no encoder, only stored rows" in refused(served, image)
        with openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="this server has no encoder; start it with"):
                client.embeddings.create(model="run/last", input="红")
            lens = {"model": "run/last", "input": {"type": "image_url", "image_url": {"url": image}}}
            with pytest.raises(openai.BadRequestError, match="no lens here: this server has no encoder"):
                client.post("/lens", body=lens, cast_to=object)
        served.stop()


@pytest.fixture(scope="module")
def both(world: Folders, features: Path) -> Iterator[Served]:
    with llava_server(*world.flags, "--features", features / "one.h5") as served:
        yield served
        served.stop()


def test_rows_and_images_from_one_server(both: Served, world: Folders) -> None:
    """A row's id is its name where no other row has it; the features are those of the live encoder."""
    image = "data:image/png;base64," + base64.b64encode(world.images[2].read_bytes()).decode()
    texts = [asked(both, url).choices[0].message.content for url in ("row:c", "row:one.h5/2", image)]
    assert len(set(texts)) == 1
    assert texts[0] != asked(both, "row:d").choices[0].message.content
    row: Any = [{"type": "image_url", "image_url": {"url": "row:c"}}]
    with openai.OpenAI(base_url=f"{both.base}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="stored rows are for answers"):
            client.embeddings.create(model="run/last", input=row)


def test_what_does_not_fit_is_refused_before_it_serves(world: Folders, tmp_path: Path) -> None:
    models = ("--checkpoint", world.checkpoint, "--llm", world.llm)
    line = run("infer", "serve", *models, "--port", 0, code=2).one_line()
    assert "--vision is missing" in line
    write_features(world, tmp_path / "other/a.h5", layer=0)
    for flags in (models, world.flags):
        line = run("infer", "serve", *flags, "--port", 0, "--features", tmp_path / "other", code=1).one_line()
        assert "encoder" in line


def test_what_names_no_row(world: Folders, features: Path) -> None:
    rows = StoredRows(open_shards(features / "one.h5"))
    shard, row = rows.find("row:d")
    assert (shard.path.name, row) == ("one.h5", 3)
    for url in ("row:", "row:one.h5", "row:one.h5/-1", "row:one.h5/٣", "row:../one.h5/0"):
        with pytest.raises(
            LlavaError, match=r"no such row of --features; expected row:ID or row:SHARD\.h5/N"
        ):
            rows.find(url)
