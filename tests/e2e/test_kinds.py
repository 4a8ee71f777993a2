"""Every kind of projector from one cache, and features wherever they stay: train, resume, ask, batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from extract.config import RunConfig as ExtractConfig
from extract.run import run as extract_run
from infer.answerer import ImageAnswerer, open_image_answerer
from infer.chat.image_dialogue import ImageDialogue
from infer.config import AskConfig
from llava_core.errors import LlavaError
from llava_core.language.sampling import Sampling
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.registry import VISUAL_TOKENS
from llava_core.shards.folder import open_shards
from tests.support.commands import call, started, wait_until
from tests.support.language_models import write_language_model
from tests.support.local_data import write_parquet, write_pictures
from tests.support.runs import config, curve, edited, flags_of, weights
from tests.support.shards import TOKENS, WIDTH, write_shard
from tests.support.vision_encoders import VISION, write_vision_folder
from train.cost_prediction import run as plan_run
from train.run import run as train_run

NAMES = [f"{i}.jpg" for i in range(8)]
TOKENS_OF = {"mlp3": 17, "lowrank4": 17, "perceiver4x2": 4, "cabstractor4x1": 4, "ldp": 4, "tokenpacker": 4}
"""Of each kind of projector, of 17 tokens."""
TOKENS_OUT = {"all": 17, "patches": 16, "pool": 4, "shuffle": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures as a shard of a 4x4 grid behind a class token, and a small language model."""
    root = tmp_path_factory.mktemp("kinds")
    vision = write_vision_folder(root / "vision", vision={**VISION, "vision_patch_size": 8})
    write_pictures(root / "set", NAMES)
    captions = [f"图 {i}" * (1 + i % 3) for i in range(8)]
    write_parquet(root / "set/data.parquet", image=NAMES, caption=captions)
    extract_run(
        ExtractConfig(data=str(root / "set/data.parquet"), out=root / "features", vision=vision, device="cpu")
    )
    write_language_model(root / "llm")
    return root


def short(world: Path, out: Path, **flags: Any) -> Any:
    return config(world, out, eval_features=world / "features", epochs=3, **flags)


def opened(world: Path, checkpoint: Path) -> ImageAnswerer:
    models = AskConfig(
        checkpoint=checkpoint, vision=world / "vision", llm=world / "llm", image=("",), device="cpu"
    )
    return open_image_answerer(models)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("visual_tokens", VISUAL_TOKENS.builtins)
def test_every_kind_learns_and_answers(
    world: Path, tmp_path: Path, kind: str, visual_tokens: str, capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(short(world, tmp_path / "run", projector=kind, visual_tokens=visual_tokens))
    said = capfd.readouterr().err
    assert f"visual tokens: {visual_tokens} (17→{TOKENS_OUT[visual_tokens]})" in said
    held_out = curve(tmp_path / "run", "eval_loss")
    assert held_out[6] < 0.99 * held_out[0]
    image = world / "set/0.jpg"
    aligned = opened(world, tmp_path / "run/last")
    trained = load_checkpoint(tmp_path / "run/last")
    assert trained.projector.config["visual_tokens"] == visual_tokens
    assert aligned.encode_files([image.read_bytes()]).shape == (1, TOKENS_OUT[visual_tokens], 32)


def test_blocks_of_other_sizes_through_every_command(world: Path, tmp_path: Path) -> None:
    features = ("--features", world / "features", "--eval-features", world / "features")
    given = (*features, "--llm", world / "llm", "--device", "cpu", "--batch-size", 4)
    space = ("--space", "visual_tokens=pool,pool4,shuffle4", "projector=linear,mlp", "--together", 6)
    sweep = call("train", "sweep", *given, *space, "--max-steps", 2, "--out", tmp_path / "sweep", "--json")
    assert sweep.summary["finished"] == 6
    assert "visual tokens: pool4 (17→1)" in sweep.err
    models = ("--vision", world / "vision", "--llm", world / "llm", "--device", "cpu")
    image = ("--image", world / "set/0.jpg")
    for visual_tokens, tokens in (("pool2", 4), ("pool4", 1), ("shuffle4", 1)):
        out = tmp_path / visual_tokens
        call("train", "run", *given, "--visual-tokens", visual_tokens, "--max-steps", 2, "--out", out)
        flags = ("--checkpoint", out / "last", *models, *image)
        assert (
            opened(world, out / "last").encode_files([(world / "set/0.jpg").read_bytes()]).shape[1] == tokens
        )
        assert call("infer", "ask", *flags, "--max-tokens", 4, "--json").summary["answer"]
        assert call("infer", "lens", *flags, "--out", out / "lens", "--json").summary["loss"] > 0
        planned = ("train", "plan", *given, "--out", tmp_path / "plan", "--visual-tokens", visual_tokens)
        assert call(*planned, "--json").summary["visual_tokens"] == tokens
    for command in ("run", "plan"):
        refused = ("train", command, *given, "--visual-tokens", "pool3", "--out", tmp_path / "none")
        line = call(*refused, code=1).one_line()
        assert "a grid of 4x4 patches cannot be cut into blocks of 3x3; expected a factor of 2 or 4" in line
    unknown = call("train", "run", *given, "--visual-tokens", "pool0", "--out", tmp_path / "none", code=2)
    assert "unknown visual tokens 'pool0'" in unknown.one_line()


def test_killed_asked_and_batched(world: Path, tmp_path: Path) -> None:
    """The commands with the kind that changes most, features in RAM."""
    given = dataclasses.replace(short(world, tmp_path / "cut"), epochs=30, projector="mlp")
    given = dataclasses.replace(given, visual_tokens="shuffle", resident="ram", keep=1000)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, (tmp_path / "cut/step-00000020").exists)
    assert not (tmp_path / "cut/summary.json").exists()
    call("train", "run", *flags_of(dataclasses.replace(given, resident="disk")), "--resume")
    train_run(dataclasses.replace(given, out=tmp_path / "whole"))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)

    models = ("--checkpoint", tmp_path / "cut/last", "--vision", world / "vision", "--llm", world / "llm")
    flags = (*models, "--device", "cpu", "--max-tokens", 8)
    asked = call("infer", "ask", *flags, "--image", world / "set/3.jpg", "--prompt", "看", "--json").summary
    question = json.dumps({"image": str(world / "set/3.jpg"), "prompt": "看"})
    (tmp_path / "q.jsonl").write_text(f"{question}\n" * 3)
    call("infer", "batch", *flags, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl")
    answers = [json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert answers == [asked["answer"]] * 3


def test_a_dialogue_about_fewer_tokens(world: Path, tmp_path: Path) -> None:
    """A second turn goes on from the cache, whose visual tokens are those after the projector."""
    train_run(short(world, tmp_path / "run", visual_tokens="pool", max_steps=2))
    aligned = opened(world, tmp_path / "run/last")
    twice, anew = (ImageDialogue(aligned, Sampling(max_tokens=6)) for _ in range(2))
    for dialogue in (twice, anew):
        dialogue.show(str(world / "set/1.jpg"))
    "".join(twice.ask("看"))
    anew.messages = list(twice.messages)
    assert "".join(twice.ask("再看")) == "".join(anew.ask("再看"))
    assert twice.figures.prefilled < anew.figures.prefilled


def test_results_are_the_same_wherever_features_stay(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "features/a.h5", rows=9, failed=[3])
    write_shard(tmp_path / "features/b.h5", rows=8, seed=1, storage="int8")
    write_shard(tmp_path / "held-out/c.h5", rows=6, seed=2)
    write_language_model(tmp_path / "llm")
    for resident, place in (("disk", "from disk"), ("ram", "kept on cpu"), ("auto", "kept on cpu")):
        given = config(tmp_path, tmp_path / resident, resident=resident, epochs=3)
        rows = 16 + 6 if place == "kept on cpu" else 0
        assert plan_run(given)["memory"].get("features_kept", 0) == rows * TOKENS * WIDTH * 2
        train_run(given)
        assert f"features {place};" in capfd.readouterr().err
    once = config(tmp_path, tmp_path / "once", epochs=1, max_steps=1)
    assert plan_run(once)["memory"]["features_kept"] == 6 * TOKENS * WIDTH * 2
    train_run(once)
    assert "features from disk;" in capfd.readouterr().err
    for resident in ("ram", "auto"):
        assert curve(tmp_path / resident) == curve(tmp_path / "disk")
        assert curve(tmp_path / resident, "eval_loss") == curve(tmp_path / "disk", "eval_loss")
        mine, theirs = (load_file(tmp_path / run / "last/model.safetensors") for run in (resident, "disk"))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_cannot_be_is_one_line_before_the_model_is_loaded(world: Path, tmp_path: Path) -> None:
    nowhere = {"llm": tmp_path / "nowhere", "eval_features": None}
    odd = write_vision_folder(
        tmp_path / "odd", vision={**VISION, "image_resolution": 24, "vision_patch_size": 8}
    )
    data = ExtractConfig(
        data=str(world / "set/data.parquet"), out=tmp_path / "features", vision=odd, device="cpu"
    )
    extract_run(data)
    with pytest.raises(LlavaError, match="a grid of 3x3 patches cannot be cut into blocks of 2x2"):
        train_run(config(tmp_path, tmp_path / "run", visual_tokens="pool", **nowhere))
    figures = train_run(short(world, tmp_path / "run", visual_tokens="shuffle", dry_run=True))
    assert figures["visual_tokens"] == 4


def test_a_run_from_before_a_flag_existed_goes_on(world: Path, tmp_path: Path) -> None:
    given = short(world, tmp_path / "run")
    train_run(given)
    (tmp_path / "run/summary.json").unlink()
    path = (tmp_path / "run/last").resolve() / "training_config.yaml"
    lines = [line for line in path.read_text().splitlines() if "visual_tokens" not in line]
    path.write_text("\n".join(lines))
    edited(path.parent)
    with pytest.raises(LlavaError, match="another --visual-tokens; expected all; got pool"):
        train_run(dataclasses.replace(given, visual_tokens="pool"))
    train_run(given)


@pytest.mark.parametrize("kind", [*TOKENS_OF, "mlp2x9"])
def test_every_projector_through_every_command(world: Path, tmp_path: Path, kind: str) -> None:
    """From its start by captions, with Muon, on features less their mean."""
    given = ("--features", world / "features", "--llm", world / "llm", "--device", "cpu", "--batch-size", 4)
    its = ("--projector", kind, "--feature-norm", "center")
    how = ("--start", "captions", "--optimizer", "muon", "--lr", 0.05, "--max-steps", 2, "--epochs", 9)
    planned = call("train", "plan", *given, *its, *how, "--out", tmp_path / "plan", "--json").summary
    evaluated = ("--eval-features", world / "features")
    ran = call("train", "run", *given, *evaluated, *its, *how, "--out", tmp_path / "run")
    tokens = TOKENS_OF.get(kind, 17)
    assert planned["visual_tokens"] == tokens
    assert f"({planned['trained_parameters']:,} parameters); visual tokens: all (17→{tokens})" in ran.err
    losses = curve(tmp_path / "run", "eval_loss")

    stored = load_file(tmp_path / "run/last/model.safetensors")
    (shard,) = open_shards(world / "features")
    rows = torch.stack([torch.as_tensor(shard.read(row)) for row in range(8)]).float()
    torch.testing.assert_close(stored["feature_norm.mean"], rows.mean((0, 1)))
    models = ("--vision", world / "vision", "--llm", world / "llm", "--device", "cpu")
    flags = ("--checkpoint", tmp_path / "run/last", *models)
    image = ("--image", world / "set/0.jpg")
    assert call("infer", "ask", *flags, *image, "--max-tokens", 4, "--json").summary["answer"]
    lens = ("infer", "lens", *flags, *image, "--out", tmp_path / "lens")
    if kind.startswith("perceiver"):
        assert "tokens of a perceiver have no place in the image" in call(*lens, code=1).one_line()
    else:
        assert call(*lens, "--json").summary["loss"] > 0
    scored = ("--checkpoint", tmp_path / "run/last", "--features", world / "features", "--llm", world / "llm")
    assert call("train", "eval", *scored, "--json").summary["loss"] == pytest.approx(losses[2], rel=1e-5)

    init = (*given, "--init", tmp_path / "run/last", "--max-steps", 1)
    call("train", "run", *init, *its, "--out", tmp_path / "more")
    line = call("train", "run", *init, "--out", tmp_path / "none", code=1).one_line()
    assert f"give --projector {kind} --visual-tokens all --feature-norm center" in line


def test_numbers_of_projectors_in_a_sweep(world: Path, tmp_path: Path) -> None:
    given = ("--features", world / "features", "--eval-features", world / "features", "--llm", world / "llm")
    space = ("projector=linear,mlp3x8,perceiver4x1,cabstractor4", "feature_norm=none,layer")
    flags = (*given, "--device", "cpu", "--space", *space, "--together", 8, "--max-steps", 2)
    swept = call("train", "sweep", *flags, "--out", tmp_path / "sweep", "--json").summary
    assert swept["finished"] == 8
    assert "perceiver4x1" in (tmp_path / "sweep/results.csv").read_text()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ("--projector", "ldp3"),
            "cut into blocks of 3x3; expected a factor of 2 or 4; use --projector ldp2",
        ),
        (("--projector", "ldp", "--visual-tokens", "pool4"), "a grid of 1x1 patches cannot be cut"),
        (("--projector", "cabstractor"), "at most the 16 patches of this encoder; got 144; use --projector"),
        (("--projector", "cabstractor15"), "expected a square such as 9 or 16; got 15; use --projector"),
        (
            ("--projector", "mlp1x64"),
            "mlp1x64 has no layers between which it is 64 wide; use --projector mlp1",
        ),
    ],
)
def test_a_projector_that_does_not_fit_the_grid(
    world: Path, tmp_path: Path, flags: tuple[str, ...], line: str
) -> None:
    given = ("--features", world / "features", "--llm", world / "llm", "--device", "cpu")
    for command in ("plan", "run"):
        refused = call("train", command, *given, *flags, "--out", tmp_path / "run", code=1)
        assert line in refused.one_line()
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_keeps_the_mean(world: Path, tmp_path: Path) -> None:
    given = short(world, tmp_path / "cut", projector="perceiver4x1", feature_norm="center", save_every=2)
    train_run(dataclasses.replace(given, out=tmp_path / "whole"))
    train_run(given)
    (tmp_path / "cut/summary.json").unlink()
    (tmp_path / "cut/last").unlink()
    (tmp_path / "cut/last").symlink_to("step-00000004")
    train_run(given)
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
