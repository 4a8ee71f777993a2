"""`llava match`: the world's Chinese-CLIP finds drawn pictures by their captions."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_align.config import MatchConfig
from llava_align.demo.world.captions import short_caption
from llava_align.demo.world.render import render
from llava_align.demo.world.scene import random_scene
from llava_align.match import command as match
from llava_align.match.chart import BLUE, MARGIN, PICTURE, draw
from llava_core.errors import LlavaError
from llava_core.report.fonts import chinese_font
from tests.support.commands import ENVIRONMENT, call
from tests.support.paths import ROOT

VISION = ROOT / "llava_align/demo/world/models/vision"


def test_images_and_their_features_are_found_by_their_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, texts, folder = random.Random(3), [], tmp_path / "图片"
    (folder / "more").mkdir(parents=True)
    names = [*(f"图{k}.png" for k in range(6)), "more/a.PNG", "more/b.jpg"]
    for name in names:
        scene = random_scene(rng)
        render(scene, rng).save(folder / name)
        texts.append(short_caption(scene, rng))
        (folder / name).with_suffix(".txt").write_text(texts[-1], encoding="utf-8")
    (folder / ".trash").mkdir()
    render(random_scene(rng), rng).save(folder / ".trash/hidden.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff?")
    shutil.copy(folder / names[0], folder / "图9.png")

    flags = ["--vision", VISION, "--images", folder, "--device", "cpu", "--top", 3, "--json"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "llava_align",
            "match",
            *map(str, flags),
            "--out",
            str(tmp_path / "new/typed.png"),
        ],
        input="\n".join(texts),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert "broken.jpg is left out: " in ended.stderr
    live = json.loads(ended.stdout.splitlines()[-1])
    assert "1 image left out: each is the same image as one before it" in ended.stderr
    assert live["images"] == 8
    (folder / "图9.png").unlink()
    assert [found["text"] for found in live["texts"]] == texts
    assert [found["matches"][0]["image"] for found in live["texts"]] == names
    for found in live["texts"]:
        cosines = [one["cosine"] for one in found["matches"]]
        assert len(cosines) == 3
        assert cosines == sorted(cosines, reverse=True)
    assert f"{texts[0]}\n" in ended.stdout
    assert f"\n{names[0]}" in ended.stdout

    call("extract", "run", "--data", folder, "--out", tmp_path / "features", "--vision", VISION,
        "--device", "cpu", "--dtype", "int8", "--thumbnails", "--max-failed", 1)  # fmt: skip
    config = MatchConfig(
        vision=VISION,
        features=tmp_path / "features",
        text=(*texts, "红" * 50, "红" * 51),
        device="cpu",
        out=tmp_path / "all.png",
    )
    stored = match.run(config)
    assert [found["cut"] for found in stored["texts"]] == [False] * 9 + [True]
    said = capsys.readouterr().err
    assert f"only the first 50 tokens of 1 text, such as '{'红' * 20}'…\n" in said
    assert "thumbnails" not in said
    for live_found, found in zip(live["texts"], stored["texts"], strict=False):
        best = found["matches"][0]
        assert best["caption"] == found["text"]
        assert best["cosine"] == pytest.approx(live_found["matches"][0]["cosine"], abs=5e-3)
    with Image.open(stored["png"]) as whole, Image.open(live["png"]) as last:
        assert (whole.width, last.width) == (760, 760)
        assert whole.height > 8 * 5 * 64 > last.height > 3 * 64
        assert len(whole.convert("RGB").getcolors(1 << 24) or []) > 100  # the thumbnails

    call("extract", "run", "--data", folder, "--out", tmp_path / "bare", "--vision", VISION,
        "--device", "cpu", "--max-failed", 1)  # fmt: skip
    match.run(dataclasses.replace(config, features=tmp_path / "bare"))
    assert "these shards keep no thumbnails" in capsys.readouterr().err


def test_without_pictures_no_strip_is_left_for_them() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    for pictures, begin in (((None, None), MARGIN), ((None, picture), 2 * MARGIN + PICTURE)):
        chart = np.asarray(draw([("a", [("b", 0.5, picture) for picture in pictures])]))
        (columns,) = np.nonzero((chart == BLUE).all(axis=2).any(axis=0))
        assert columns.min() == begin


@pytest.mark.skipif(chinese_font(20) is None, reason="no Chinese font here; scripts/setup.sh installs one")
def test_chinese_labels_are_characters_and_not_boxes() -> None:
    red, blue, same = (
        np.asarray(draw([(t, [("图", 0.5, None)])])) for t in ("红色圆形", "蓝色方块", "红色圆形")
    )
    assert red.shape == blue.shape
    assert (red != blue).any()
    assert (red == same).all()


def test_without_a_chinese_font_it_says_so(tmp_path: Path) -> None:
    code = 'from llava_align.match.chart import draw; print(draw([("红", [("a.png", -0.1, None)])]).size)'
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **dict.fromkeys(("HOME", "XDG_DATA_DIRS", "XDG_DATA_HOME"), str(tmp_path))},
        check=True,
    )
    assert ended.stdout == "(760, 144)\n"
    assert ended.stderr.startswith("no Chinese font on this machine: install one")


def test_what_cannot_be_matched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlavaError, match="either --images or --features"):
        MatchConfig(vision=VISION)
    with pytest.raises(LlavaError, match="--text; expected a text"):
        MatchConfig(vision=VISION, images=tmp_path, text=(" ",))
    for name in ("chart", "chart.txt"):  # what Pillow could not write, before anything is encoded
        with pytest.raises(LlavaError, match=rf"--out; expected a file named \*\.png .*; got {name}$"):
            MatchConfig(vision=VISION, images=tmp_path, out=Path(name))
    (tmp_path / "file").touch()
    with pytest.raises(LlavaError, match=r"--out; expected a folder; got the file .*file$"):
        MatchConfig(vision=VISION, images=tmp_path, out=tmp_path / "file/new/a.png")
    with monkeypatch.context() as patched:
        patched.setattr("os.access", lambda path, mode: path != tmp_path)
        with pytest.raises(LlavaError, match=r"--out; expected a folder that can be written to"):
            MatchConfig(vision=VISION, images=tmp_path, out=tmp_path / "new/a.png")
    assert MatchConfig(vision=VISION, images=tmp_path, out=Path("图.JPG")).out.suffix == ".JPG"
    with pytest.raises(LlavaError, match="no images in"):
        MatchConfig(vision=VISION, images=tmp_path).require_inputs()
    with pytest.raises(LlavaError, match="no folder"):
        MatchConfig(vision=VISION, images=tmp_path / "none").require_inputs()
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(LlavaError, match=r"no image in .* can be read"):
        match.run(MatchConfig(vision=VISION, images=tmp_path, text=("红",), device="cpu"))
