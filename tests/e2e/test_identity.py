"""Every command that takes a checkpoint notices other files beside the same weights, wherever they lie."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llava_align.hub.import_projector import run as import_run
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.projector.checkpoint import load_checkpoint, point_to
from tests.e2e.test_import import config as import_config
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call
from tests.support.features import write_features
from tests.support.runs import config, flags_of, weights
from train.config import RunConfig
from train.run import run as train_run
from train.sweep.command import run as sweep_run
from train.sweep.config import SweepConfig


@dataclasses.dataclass(frozen=True)
class Trained:
    """A world, features of its encoder, and a run of 4 steps on them with a checkpoint after 2."""

    world: Folders
    given: RunConfig
    other: Path
    """The language model with another chat template."""

    @property
    def out(self) -> Path:
        return self.given.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    world = write_aligned(root / "world")
    for name in ("features", "held-out"):
        write_features(world, root / name / "part.h5")
    given = config(root, root / "run", llm=world.llm, batch_size=2, epochs=2, eval_every=2, save_every=2)
    train_run(given)
    other = shutil.copytree(world.llm, root / "other/llm")
    template = other / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("user\n", "user "), encoding="utf-8")
    return Trained(world, given, other)


@pytest.fixture
def unfinished(trained: Trained, tmp_path: Path) -> RunConfig:
    """The run as a kill after step 3 leaves it, in a folder of its own."""
    out = shutil.copytree(trained.out, tmp_path / "run", symlinks=True)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "step-00000004")
    for link in ("last", "best"):
        point_to(out / link, out / "step-00000002")
    return dataclasses.replace(trained.given, out=out)


@pytest.fixture
def moved(trained: Trained, tmp_path: Path) -> dict[str, Any]:
    """The run's data and language model under other names."""
    given = trained.given
    assert isinstance(given.features, Path)
    assert isinstance(given.eval_features, Path)
    return {
        "features": shutil.copytree(given.features, tmp_path / "cache"),
        "eval_features": shutil.copytree(given.eval_features, tmp_path / "judged"),
        "llm": shutil.copytree(given.llm, tmp_path / "qwen"),
    }


@pytest.mark.parametrize(
    "command",
    [
        ("train", "eval", "--features"),
        ("infer", "ask", "--vision", "--image"),
        ("infer", "batch", "--vision", "--input", "--output"),
        ("infer", "batch", "--features", "--output"),
        ("infer", "chat", "--vision"),
        ("infer", "serve", "--vision"),
        ("infer", "lens", "--vision", "--image", "--out"),
        ("llava_align", "export", "--vision", "--out"),
        ("llava_align", "trace", "--vision", "--image", "--caption"),
    ],
    ids=" ".join,
)
def test_another_template_beside_the_same_weights(
    trained: Trained, tmp_path: Path, command: tuple[str, ...]
) -> None:
    world = trained.world
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": str(world.images[0])}) + "\n")
    values = {
        "--features": trained.given.features,
        "--vision": world.vision,
        "--image": world.images[0],
        "--input": tmp_path / "in.jsonl",
        "--output": tmp_path / "out.jsonl",
        "--out": tmp_path / "out",
        "--caption": "圆",
    }
    module, verb, *flags = command
    models = ("--checkpoint", trained.out / "last", "--llm", trained.other)
    given = [part for flag in flags for part in (flag, values[flag])]
    line = call(module, verb, *models, *given, code=1).one_line()
    assert "expected llm (weights " in line
    assert (
        "token 5 of a fixed dialogue through the chat template: 203 Ċ vs 225 Ġ; give --llm the folder" in line
    )
    assert not (tmp_path / "out").exists()


def test_another_template_ends_a_run_and_starts_none(
    trained: Trained, unfinished: RunConfig, tmp_path: Path
) -> None:
    for given in (
        dataclasses.replace(unfinished, llm=trained.other),
        dataclasses.replace(trained.given, llm=trained.other),  # which is finished
        dataclasses.replace(
            trained.given, llm=trained.other, init=trained.out / "last", out=tmp_path / "new"
        ),
    ):
        line = call("train", "run", *flags_of(given), code=1).one_line()
        assert "token 5 of a fixed dialogue" in line
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_wherever_its_folders_are(
    trained: Trained, unfinished: RunConfig, moved: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    train_run(dataclasses.replace(unfinished, **moved, resume=True))
    assert "continued at step 2" in capfd.readouterr().err
    for name, value in weights(trained.out).items():
        assert torch.equal(weights(unfinished.out)[name], value)
    # Of a finished run what lies there is compared, too.
    train_run(dataclasses.replace(trained.given, **moved))
    assert "is finished; nothing to do" in capfd.readouterr().err
    for key, message in (("features", "shards have changed"), ("eval_features", "shards have changed")):
        (shard,) = moved[key].glob("*.h5")
        shard.rename(shard.with_name("other.h5"))
        with pytest.raises(LlavaError, match=message):
            train_run(dataclasses.replace(trained.given, **moved))
        shard.with_name("other.h5").rename(shard)


def test_a_run_keeps_the_projector_of_its_init(
    trained: Trained, unfinished: RunConfig, tmp_path: Path
) -> None:
    given = dataclasses.replace(trained.given, init=trained.out / "last", out=tmp_path / "new")
    train_run(given)
    elsewhere = shutil.copytree(trained.out / "last", tmp_path / "elsewhere")
    train_run(dataclasses.replace(given, init=elsewhere))
    with pytest.raises(LlavaError, match=r"holds a run with another --init; expected .*last; got"):
        train_run(dataclasses.replace(given, init=trained.out / "step-00000002"))
    shutil.rmtree(given.out / "step-00000004")
    (given.out / "last").unlink()
    with pytest.raises(LlavaError, match="has no checkpoint left to compare --init with; name the folder as"):
        train_run(dataclasses.replace(given, init=elsewhere))


def test_a_sweep_goes_on_wherever_its_folders_are(
    trained: Trained, moved: dict[str, Any], tmp_path: Path
) -> None:
    flags = {**vars(trained.given), "out": tmp_path / "sweep", "max_steps": 2}
    sweep_run(SweepConfig(**flags, space=("lr=0.01,0.02",), trials=1))
    sweep_run(SweepConfig(**{**flags, **moved}, space=("lr=0.01,0.02",)))
    figures = sweep_run(SweepConfig(**{**flags, **moved}, space=("lr=0.01,0.02",)))
    assert figures["finished"] == 2
    other = SweepConfig(**{**flags, **moved, "llm": trained.other}, space=("lr=0.01,0.02",))
    with pytest.raises(
        LlavaError, match=r"^the language model of the sweep in .*: token 5 of a fixed dialogue"
    ):
        sweep_run(other)
    (shard,) = moved["features"].glob("*.h5")
    shard.rename(shard.with_name("other.h5"))
    with pytest.raises(LlavaError, match=r"^the training rows of the sweep in"):
        sweep_run(SweepConfig(**{**flags, **moved}, space=("lr=0.01,0.02",)))


def test_wandb_goes_on_in_the_same_run(unfinished: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []

    class Run:
        def log(self, *_: object, **__: object) -> None: ...
        def finish(self) -> None: ...

    def init(**given: Any) -> Run:
        begun.append(given)
        return Run()

    wandb = types.SimpleNamespace(
        init=init, Table=lambda **_: None, errors=types.SimpleNamespace(Error=OSError)
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    shutil.rmtree(unfinished.out)
    given = dataclasses.replace(unfinished, report_to=("wandb",), max_steps=3)
    with monkeypatch.context() as killed:
        killed.setattr(Run, "log", lambda self, *_, step: interrupt_at(2, step))
        with pytest.raises(KeyboardInterrupt):
            train_run(given)
    train_run(given)
    assert [run["id"] for run in begun] == [(unfinished.out / "wandb_run_id").read_text().strip()] * 2
    assert {run["resume"] for run in begun} == {"allow"}
    shutil.rmtree(unfinished.out)
    train_run(given)
    assert begun[2]["id"] != begun[0]["id"]


def interrupt_at(last: int, step: int) -> None:
    if step == last:
        raise KeyboardInterrupt


def test_a_whole_model_is_imported_only_beside_its_own_language_model(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The course's stage2_*.pt: `llm.*` beside `projection.*`."""
    world = trained.world
    projector = load_checkpoint(trained.out / "last").projector.map.state_dict()
    stage2 = {f"projection.{name}": value for name, value in projector.items()}
    model = AutoModelForCausalLM.from_pretrained(world.llm)
    stage2 |= {f"llm.{name}": value.clone() for name, value in model.state_dict().items()}
    stage2["llm.model.rotary_emb.inv_freq"] = torch.ones(8)
    given = import_config(world, tmp_path, {name: value.bfloat16() for name, value in stage2.items()})
    import_run(given)
    imported = load_checkpoint(given.out).provenance.language_model
    assert imported == load_checkpoint(trained.out / "last").provenance.language_model

    stage2["llm.model.norm.weight"] += 0.5
    given = dataclasses.replace(import_config(world, tmp_path, stage2), out=tmp_path / "whole")
    import_run(given)
    assert "language model: trained whole, in llm/ (by its weights)" in capfd.readouterr().err
    assert load_checkpoint(given.out).provenance.language_model == imported
    llm = load_language_model(world.llm)
    load_checkpoint(given.out).tune_model(llm)
    now = llm.model.state_dict()
    assert all(torch.equal(now[name], stage2[f"llm.{name}"]) for name in model.state_dict())

    del stage2["llm.model.embed_tokens.weight"]  # not whole: nothing says what the rest is
    given = dataclasses.replace(import_config(world, tmp_path, stage2), out=tmp_path / "stage2")
    with pytest.raises(
        LlavaError,
        match=r"given\.bin holds other weights than the language model in .*trained t"
        r"ogether.*; expected llm\.model\.norm\.weight as there; got other values; import sta",
    ):
        import_run(given)
    assert not given.out.exists()
    # As the message says: with the trained weights as a folder, projector and model belong together.
    model.load_state_dict({"model.norm.weight": stage2["llm.model.norm.weight"]}, strict=False)
    own = shutil.copytree(world.llm, tmp_path / "own")
    model.save_pretrained(own)
    import_run(dataclasses.replace(given, llm=own))
    line = call("infer", "ask", "--checkpoint", given.out, "--vision", world.vision, "--llm", world.llm,
                "--image", world.images[0], code=1).one_line()  # fmt: skip
    assert "other weights" in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llm.model.layers.0.self_attn.q_proj.lora_A.default.weight", "holds more than a projector"),
        ("decoder.blocks.0.attn.out.weight", r"such as decoder\.blocks\.0.*save the projector's weights"),
        ("clip.visual.ln_post.weight", r"other weights than the vision: .*expected clip\.visual\.ln_post"),
        ("llm.lm_head.weight", r"expected llm\.lm_head\.weight \[264, 32\]; got \[3, 4\]"),
    ],
)  # fmt: skip
def test_what_lies_beside_a_projector_is_not_passed_over(
    trained: Trained, tmp_path: Path, name: str, message: str
) -> None:
    projector = load_checkpoint(trained.out / "last").projector.map.state_dict()
    beside = {f"projection.{key}": value for key, value in projector.items()} | {name: torch.ones(3, 4)}
    if name.endswith("ln_post.weight"):
        beside[name] = torch.full((64,), 7.0)
    with pytest.raises(LlavaError, match=message):
        import_run(import_config(trained.world, tmp_path, beside))
