"""The small world: words and pictures agree, and the judge can neither be pleased nor fooled."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import english_world as english
from llava_align.demo.contact_sheet import is_right
from llava_align.demo.world.captions import (
    accuracy,
    caption,
    chance,
    parse,
    parse_background,
    short_caption,
    shuffled,
)
from llava_align.demo.world.dataset import write_split
from llava_align.demo.world.render import SIDE, render
from llava_align.demo.world.scene import PLACES, Scene, Thing, near_scene, random_scene
from llava_align.demo.world.server import TROUBLES, serve
from llava_core.language.load import load_language_model
from llava_core.network.fetch import fetch_all
from llava_core.network.fetch_limits import FetchLimits
from llava_core.row_status import Status
from llava_core.vision.chinese_clip import CONTEXT
from llava_core.vision.open import open_vision_tower
from tests.support.paths import WORLD_MODELS


def scenes(n: int) -> list[Scene]:
    rng = random.Random(0)
    return [random_scene(rng) for _ in range(n)]


def test_captions_say_exactly_what_is_there() -> None:
    rng = random.Random(1)
    for scene in scenes(300):
        for text in (caption(scene, rng), caption(scene, rng)):
            assert tuple(parse(text)) == scene.things
            assert parse_background(text) == scene.background
        assert len(short_caption(scene, rng)) <= CONTEXT - 2


def test_english_captions_say_exactly_what_is_there() -> None:
    scene = Scene((Thing("左侧", "大", "红色", "圆形"), Thing("右下角", "小", "橙色", "菱形")), "白色")
    text = "A big red circle on the left, a small orange diamond at the bottom right."
    assert english.caption(scene) == text
    some = scenes(300)
    assert all(tuple(english.parse(english.caption(scene))) == scene.things for scene in some)
    things = {thing for scene in some for thing in scene.things}
    assert len({english.phrase(thing) for thing in things}) == len(things)
    assert (
        english.parse("A red circle on the left, a small blue circle, a big blue star at the topmost.") == []
    )
    assert accuracy([scene], [text.replace("red", "green")], english.parse) == {
        "shape": 1,
        "colour": 0.5,
        "place": 1,
        "size": 1,
        "all": 7 / 8,
    }


def test_the_judge() -> None:
    scene = Scene((Thing("上方", "大", "红色", "圆形"), Thing("中央", "小", "蓝色", "菱形")), "白色")
    right = caption(scene, random.Random(0))
    assert accuracy([scene], [right])["all"] == 1
    assert accuracy([scene], [""])["all"] == 0
    assert accuracy([scene], [right.replace("红色", "绿色")]) == {
        "shape": 1,
        "colour": 0.5,
        "place": 1,
        "size": 1,
        "all": 7 / 8,
    }
    # Naming everything there might be does not help.
    much = "，".join(f"{place}有一个大的红色圆形" for place in PLACES)
    assert accuracy([scene], [much])["all"] < 0.5
    # Nor does the order of objects matter.
    first, second = right.split("。")[-2].split("，")[-2:] if "，" in right else ("", "")
    swapped = right.replace(f"{first}，{second}", f"{second}，{first}")
    assert accuracy([scene], [swapped])["all"] == 1


def test_a_wrong_size_is_wrong() -> None:
    scene = Scene((Thing("上方", "大", "红色", "圆形"), Thing("中央", "小", "蓝色", "菱形")), "白色")
    right = caption(scene, random.Random(0))
    assert accuracy([scene], [right.replace("小", "大")])["size"] == 0.5
    assert is_right(scene, right)
    wrong = [("小", "大"), ("红色", "绿色"), ("白色", "灰色"), ("中央", "左侧"), ("菱形", "圆形")]
    assert not any(is_right(scene, right.replace(*words)) for words in wrong)


def test_a_shuffled_picture_shows_another_scene() -> None:
    one, other = scenes(2)
    assert shuffled([one, one, other, other], ["a", "b", "c", "d"]) == ["c", "d", "a", "b"]
    with pytest.raises(ValueError, match="3 pictures of one scene"):
        shuffled([one] * 3, ["a"] * 3)


def test_chance_is_what_a_stranger_scores() -> None:
    level = chance(scenes(2000), random.Random(0))
    assert 0.15 < level["all"] < 0.3
    assert accuracy(scenes(2000), [caption(s, random.Random(0)) for s in scenes(2000)])["all"] == 1


def test_near_scenes_differ_in_one_attribute() -> None:
    rng = random.Random(0)
    for scene in scenes(200):
        near = near_scene(scene, rng)
        ours, theirs = set(scene.things), set(near.things)
        assert len(ours - theirs) == len(theirs - ours) == 1
        a, b = dataclasses.astuple((ours - theirs).pop()), dataclasses.astuple((theirs - ours).pop())
        assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


def test_pictures_show_the_object_in_its_place() -> None:
    for place in PLACES:
        scene = Scene((Thing(place, "大", "黑色", "正方形"),), "白色")
        dark = np.asarray(render(scene, random.Random(0)).convert("L")) < 128
        row, column = (int(axis.mean()) * 3 // SIDE for axis in dark.nonzero())
        assert PLACES[3 * row + column] == place


def test_data_in_both_forms_with_its_troubles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(tmp_path / "pictures") as url:
        split = write_split(tmp_path, "train", url, rows=60, files=2, seed=0, odd=TROUBLES)
        tables = [pq.read_table(path).to_pylist() for path in sorted(split.parquet.iterdir())]
        rows = [row for table in tables for row in table]
        assert [len(table) for table in tables] == [30, 30]
        assert isinstance(rows[0]["cap_seg"], dict)
        assert json.loads(rows[-1]["cap_seg"])["global_caption"]
        limits = FetchLimits(allow_private=True, timeout=1, retries=0)
        fetched = [answer.status for answer in fetch_all([row["url"] for row in rows], limits)]
        assert fetched.count(Status.HTTP_4XX) == 3
        assert fetched.count(Status.TIMEOUT) == 1
        assert fetched.count(Status.OK) == 56
        (outside,) = fetch_all([f"{url}/../secret"], limits)
        assert outside.status is Status.HTTP_4XX
        time.sleep(0.5)  # the slow picture's next byte finds nobody
    assert not caplog.records
    for row, scene in zip(rows, split.scenes, strict=True):
        seg = row["cap_seg"] if isinstance(row["cap_seg"], dict) else json.loads(row["cap_seg"])
        assert tuple(parse(seg["global_caption"])) == scene.things


def test_the_shipped_models_are_small_frozen_and_strangers() -> None:
    tower, llm = (
        open_vision_tower(WORLD_MODELS / "vision", text=True),
        load_language_model(WORLD_MODELS / "llm"),
    )
    assert llm.identity.architecture == "Qwen3ForCausalLM"
    assert tower.tokens == 37
    assert sum(path.stat().st_size for path in WORLD_MODELS.rglob("*")) < 8_000_000
    assert not any(parameter.requires_grad for parameter in llm.model.parameters())
    assert len(llm.tokenizer("左上角")["input_ids"]) == 1
    # The encoder's text tower knows the world: the right caption beats one with another colour.
    scene = Scene((Thing("中央", "大", "红色", "圆形"),), "白色")
    pixels = np.asarray(render(scene, random.Random(0)).resize((tower.preprocess.size,) * 2))
    texts = [f"白色背景，中央有大的{colour}圆形" for colour in ("红色", "蓝色", "绿色")]
    likeness = tower.encode_image_embedding(pixels[None].copy()) @ tower.encode_text(texts).T
    assert likeness.argmax() == 0
