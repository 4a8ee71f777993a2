"""`infer lens`: its picture, and its page in a browser."""

from __future__ import annotations

from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from infer.answerer import open_image_answerer
from infer.config import LensConfig
from infer.lens.command import analyse
from tests.support.aligned import write_aligned
from tests.support.browser import dom_of
from tests.support.commands import call, run
from tests.support.features import models


def test_picture_and_page_show_the_words(tmp_path: Path) -> None:
    world = write_aligned(tmp_path / "world")
    caption = "红</script><b>圆"
    flags = [*world.flags, "--image", world.images[0], "--caption", caption]
    summary = run("infer", "lens", *flags, "--out", tmp_path / "new/lens", "--top", 3, "--json").summary
    config = LensConfig(
        **models(world),
        image=str(world.images[0]),
        caption=caption,
        top=3,
        other=str(world.images[1]),
    )
    result = analyse(open_image_answerer(config), config)
    assert [(panel.projector, panel.readout) for panel in result.panels] == [
        ("trained projector", "nearest input embeddings"),
        ("random projector", "nearest input embeddings"),
        ("trained projector", "logit lens after block 1"),
        ("random projector", "logit lens after block 1"),
    ]
    for panel in result.panels:
        assert [len(words) for words in (*panel.words, panel.class_words)] == [3] * 5
    assert result.panels[0].words != result.panels[1].words
    assert "".join(result.pieces) == caption
    assert (summary["caption"], summary["loss"]) == (caption, pytest.approx(sum(result.loss), rel=1e-4))
    assert (summary["other"], result.other) == ("a blank image", str(world.images[1]))
    assert summary["other_loss"] != summary["loss"] != sum(result.other_loss)

    with Image.open(summary["png"]) as picture:
        assert min(picture.size) > 800
        assert len(picture.getcolors(1 << 24)) > 50
    dom = unescape(dom_of(Path(summary["html"]), tmp_path / "profile"))
    shown = dom.split('<div id="panels">')[1]
    for panel in result.panels[:2]:
        for words in panel.words:
            assert f'title="{"   ".join(f"{word} {score:.2f}" for word, score in words)}"' in shown
    assert shown.count('class="patch') == 8
    assert "<b>" not in dom  # no caption becomes markup
    assert shown.count('class="piece') == len(result.pieces)


def test_an_image_is_compared_with_another(tmp_path: Path) -> None:
    world = write_aligned(tmp_path / "world")
    flags = [*world.flags, "--image", world.images[0], "--caption", "红", "--out", tmp_path / "lens"]
    same = call("infer", "lens", *flags, "--other", world.images[0], code=1).one_line()
    assert "--other shows the same image" in same
    Image.new("RGB", (64, 64), (9, 9, 9)).save(world.images[0])
    assert "is a blank image itself" in call("infer", "lens", *flags, code=1).one_line()
