"""`llava trace` beside the shard and the loss that extract and train make of the same sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_align.config import TraceConfig
from llava_align.demo import trace
from llava_core.errors import LlavaError
from llava_core.language.instructions import pick_instruction
from llava_core.language.load import load_language_model
from llava_core.shards.reader import Shard
from tests.support.aligned import write_aligned
from tests.support.commands import call
from train.config import EvalConfig
from train.evaluate import run as evaluate

CAPTION = "红色的圆 a。"


def test_its_figures_are_those_of_extract_and_train(tmp_path: Path) -> None:
    world = write_aligned(tmp_path / "world")
    folder = tmp_path / "pics"
    folder.mkdir()
    shutil.copy(world.images[0], folder / "one.png")
    (folder / "one.txt").write_text(CAPTION, encoding="utf-8")
    call("extract", "run", "--data", folder, "--out", tmp_path / "features", "--vision", world.vision,
        "--device", "cpu")  # fmt: skip
    traced = call("llava_align", "trace", *world.flags, "--image", folder / "one.png", "--caption", CAPTION,
                  "--prompt", pick_instruction(0, "0/pics/0"), "--json")  # fmt: skip
    figures, stages = traced.summary, {stage["name"].strip(): stage for stage in traced.summary["stages"]}

    features = Shard(tmp_path / "features/pics.h5").read(0).astype(np.float32)
    stored = stages["features as a shard has them"]
    assert (stored["shape"], stored["dtype"]) == ("5×64", "float16")
    assert stored["norm"] == pytest.approx(float(np.linalg.norm(features, axis=-1).mean()), rel=1e-5)
    assert stages["CLS"]["norm"] == pytest.approx(float(np.linalg.norm(features[0])), rel=1e-3)
    assert stages["image"]["shape"] == "30×40×3"
    assert stages["decoded, squash"]["shape"] == "32×32×3"
    assert stages["normalised"]["shape"] == "3×32×32"
    assert stages["visual tokens, projected"]["shape"] == "5×32"

    held_out = evaluate(
        EvalConfig(
            checkpoint=world.checkpoint,
            llm=world.llm,
            features=tmp_path / "features",
            device="cpu",
        )
    )
    assert held_out["samples"] == 1
    assert figures["answer_tokens"] == held_out["answer_tokens"]
    assert figures["loss"] == pytest.approx(held_out["loss"], rel=1e-5)
    learnt = [token for token in figures["tokens"] if token["learnt"]]
    assert sum(token["loss"] for token in learnt) / len(learnt) == pytest.approx(figures["loss"], rel=1e-5)
    tokenizer = load_language_model(world.llm).tokenizer
    assert tokenizer.decode([token["id"] for token in learnt]) == CAPTION + "<|im_end|>"
    positions = [token["position"] for token in figures["tokens"]]
    assert positions == list(range(5, 5 + len(positions)))
    assert f"= {figures['loss']:.4f}\n" in traced.out


def test_without_flags_it_is_a_sample_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    figures = trace.run(TraceConfig(device="cpu"))
    stages = {stage["name"]: stage for stage in figures["stages"]}
    assert "random: no --checkpoint" in capsys.readouterr().err
    assert stages["image"]["shape"] == "192×192×3"
    rms = load_language_model(TraceConfig().llm).embedding_rms
    assert stages["visual tokens, projected"]["rms"] == pytest.approx(rms, rel=1e-5)
    assert "".join(token["token"] for token in figures["tokens"] if token["learnt"]) == (
        figures["caption"] + "<|im_end|>"
    )


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="--image and --caption; expected both or neither"):
        TraceConfig(image="a.png")
    with pytest.raises(LlavaError, match="--caption; expected a text; got nothing"):
        TraceConfig(image="a.png", caption="  ")
    world = write_aligned(tmp_path)
    with pytest.raises(LlavaError, match="trained on features of another vision encoder"):
        trace.run(TraceConfig(checkpoint=world.checkpoint, llm=world.llm, device="cpu"))
    image, long = str(world.images[0]), "红" * 1300
    with pytest.raises(LlavaError, match=r"the sample does not fit .*; expected at most 1,024 tokens; got 1"):
        trace.run(TraceConfig(image=image, caption=long, max_text_tokens=1300, device="cpu"))
    (tmp_path / "a.psd").write_bytes(b"8BPS" + bytes(64))
    with pytest.raises(LlavaError, match=r"cannot read .*a\.psd as an image: unsupported format"):
        trace.run(TraceConfig(image=str(tmp_path / "a.psd"), caption="a", device="cpu"))
