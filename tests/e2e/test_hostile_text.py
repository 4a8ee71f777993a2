"""Names, captions, hosts and answers as a hostile stranger writes them, on their way to a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.commands import Ended, call
from tests.support.hostile_text import VILE, assert_harmless
from tests.support.language_models import write_language_model
from tests.support.pictures import picture
from tests.support.vision_encoders import write_vision_folder

NAME = VILE.replace("\udc9b", "")  # what a file may be called


def seen(*arguments: object, code: int = 0) -> Ended:
    """`call`, its results shown in a terminal; asserts that nothing in it does anything."""
    ended = call(*arguments, code=code, pipe=False)
    assert_harmless(ended.out + ended.err, keep="\n\t")
    return ended


def test_strangers_have_no_hand_in_the_terminal(tmp_path: Path) -> None:
    vision = write_vision_folder(tmp_path / f"vision{NAME}")
    llm = write_language_model(tmp_path / f"llm{NAME}")
    data, out, run = tmp_path / f"data{NAME}", tmp_path / f"out{NAME}", tmp_path / f"run{NAME}"
    data.mkdir()
    urls = [f"http://{NAME}.invalid/{i}.jpg" for i in range(3)]
    rows = {"url": urls, "caption": [f"红{NAME}{i}" for i in range(3)], "id": [NAME] * 3}
    pq.write_table(pa.table(rows), data / f"a{NAME}.parquet")
    local = tmp_path / f"local{NAME}"
    local.mkdir()
    for i in range(6):
        (local / f"{i}{NAME}.jpg").write_bytes(picture(i))
        (local / f"{i}{NAME}.txt").write_text(f"红色{NAME}{i}")

    extract = ("extract", "run", "--vision", vision, "--device", "cpu", "--retries", 0, "--patience", 0)
    failed = seen(*extract, "--data", data, "--out", out / "web", code=3)
    assert "most failures" in failed.err
    seen(*extract, "--data", local, "--out", out / "local", "--thumbnails")
    assert "nothing to do" in seen(*extract, "--data", local, "--out", out / "local").err
    seen("extract", "inspect", "--out", out / "web")
    seen("extract", "verify", "--out", out / "local")
    seen("extract", "inspect", "--out", tmp_path / f"none{NAME}", code=1).one_line()
    match = ("llava_align", "match", "--vision", vision, "--text", f"红{NAME}", "--out", tmp_path / "m.png")
    assert "\\u202e" in seen(*match, "--images", local).out
    seen(*match, "--features", out / "local")

    train = ("--features", out / "local", "--llm", llm, "--device", "cpu")
    flags = ("--eval-features", out / "local", "--out", run, "--max-steps", 2, "--batch-size", 2)
    trained = seen("train", "run", *train, *flags, "--json")
    assert json.loads(trained.out.splitlines()[-1])
    seen("train", "run", *train, *flags, "--lr", 0.5, code=1).one_line()
    seen("train", "eval", *train, "--checkpoint", run / "last")
    infer = ("--checkpoint", run / "last", "--vision", vision, "--llm", llm, "--device", "cpu")
    (image, *_) = sorted(local.glob("*.jpg"))
    asked = seen("infer", "ask", *infer, "--image", image, "--image", tmp_path / NAME, "--max-tokens", 40,
                 "--json", code=1)  # fmt: skip
    assert json.loads(asked.out.splitlines()[-1])["answers"][0]["image"] == str(image)
    seen("infer", "lens", *infer, "--image", image, "--caption", f"红{NAME}", "--out", tmp_path / f"l{NAME}")
    seen("llava_align", "trace", *infer, "--image", image, "--caption", f"红{NAME}")


def test_an_answer_is_exact_in_a_pipe_and_visible_in_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infer.chat.image_dialogue import ImageDialogue
    from tests.support.aligned import write_aligned

    world = write_aligned(tmp_path)
    monkeypatch.setattr(ImageDialogue, "ask", lambda self, prompt: iter([f"a{NAME}", "b\n\tc"]))
    command = ("infer", "ask", *world.flags, "--image", world.images[0])
    assert call(*command).out == f"a{NAME}b\n\tc\n"
    assert seen(*command).out.endswith("b\n\tc\n")
