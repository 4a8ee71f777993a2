"""Stage 2: the language model trains, too, by LoRA or whole, from the same cache and as exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_align import AlignedModel
from llava_align.hub.push import files_to_push
from llava_core.errors import LlavaError
from llava_core.filesystem import read_json_lines
from llava_core.language.load import load_language_model
from llava_core.language.tuned_weights import LoraAdapter
from llava_core.projector.checkpoint import load_checkpoint, save_checkpoint
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call, run, started, wait_until
from tests.support.language_models import write_language_model
from tests.support.paths import GOLDEN
from tests.support.runs import config, curve, edited, flags_of
from train import resources
from train.config import EvalConfig, RunConfig
from train.evaluate import run as evaluate_run
from train.run import require_same_steps
from train.run import run as train_run
from train.run_folder import weights_sha256
from train.sweep.run_trials import can_share_step

PART = {"lora": "adapter", "llm": "llm"}
WEIGHTS = {"lora": "adapter/adapter_model.safetensors", "llm": "llm/model.safetensors"}
POLICIES = sorted(PART)


@pytest.fixture(scope="module")
def stage1(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "run"
    train_run(config(world, out))
    return out / "best"


def stage2_config(world: Path, stage1: Path, out: Path, tune: Any, **flags: Any) -> RunConfig:
    """24 steps at a rate at which few steps matter, with decay and clipping."""
    given: dict[str, Any] = {"init": stage1, "tune": tune, "lora_rank": 4, "lr": 0.005, "lr_llm": 0.005}
    return config(world, out, **{**given, "weight_decay": 0.1, "grad_clip": 1.0, **flags})


@pytest.fixture(scope="module", params=POLICIES)
def tuned(
    request: pytest.FixtureRequest, world: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An undisturbed run of stage 2; the folder of its parent is named for its policy."""
    out: Path = tmp_path_factory.mktemp("runs") / request.param / "run"
    train_run(stage2_config(world, stage1, out, request.param))
    return out


def tune_of(run: Path) -> str:
    return run.parent.name


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "last/model.safetensors") | load_file(run / "last" / WEIGHTS[tune_of(run)])


def test_it_begins_where_stage_1_ended_and_goes_further(world: Path, stage1: Path, tuned: Path) -> None:
    before = evaluate_run(EvalConfig(checkpoint=stage1, features=world / "held-out", llm=world / "llm"))
    held_out = curve(tuned, "eval_loss")
    assert held_out[0] == pytest.approx(before["loss"], rel=1e-6)  # whose blocks are written out
    assert held_out[24] < held_out[0] - 0.1


def test_the_golden_curve_of_each_policy(tuned: Path) -> None:
    now = [round(loss, 6) for loss in curve(tuned).values()]
    golden = json.loads((GOLDEN / "stage2_loss_curves.json").read_text())
    assert now == pytest.approx(golden[tune_of(tuned)], rel=1e-4)


def test_a_checkpoint_has_what_was_trained_of_the_model(world: Path, tuned: Path) -> None:
    figures = evaluate_run(
        EvalConfig(checkpoint=tuned / "last", features=world / "held-out", llm=world / "llm")
    )
    assert figures["loss"] == pytest.approx(curve(tuned, "eval_loss")[24], rel=1e-5)
    assert (
        json.loads((tuned / "last/config.json").read_text())["version"] == 3
    )  # of which earlier ones know none
    base = load_language_model(world / "llm").model.state_dict()
    model = load_language_model(world / "llm")
    load_checkpoint(tuned / "last").tune_model(model)
    now = model.model.state_dict()
    assert now.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], now[name])}
    linear = {name for name in base if "_proj" in name}
    assert changed == (linear if tune_of(tuned) == "lora" else set(base))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks by a name of before
def test_stock_libraries_load_it(world: Path, tuned: Path) -> None:
    """peft the adapter, transformers the model: the logits are those of our own loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = load_language_model(world / "llm")
    load_checkpoint(tuned / "last").tune_model(ours)
    if tune_of(tuned) == "lora":
        stock = AutoModelForCausalLM.from_pretrained(world / "llm", dtype=torch.float32)
        stock = PeftModel.from_pretrained(stock, tuned / "last/adapter").eval()
    else:
        stock = AutoModelForCausalLM.from_pretrained(tuned / "last/llm", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(stock(ids).logits, ours.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_resumed_after_a_kill_is_bit_equal(world: Path, stage1: Path, tuned: Path, tmp_path: Path) -> None:
    given = stage2_config(world, stage1, tmp_path / tune_of(tuned) / "cut", tune_of(tuned), keep=1000)
    given = dataclasses.replace(given, save_every=2)
    with started("train", "run", *flags_of(given)) as process:
        wait_until(process, (given.out / "step-00000008").exists)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
    assert not (given.out / "summary.json").exists()
    call("train", "run", *flags_of(given), "--resume")
    assert curve(given.out) == curve(tuned)
    assert curve(given.out, "eval_loss") == curve(tuned, "eval_loss")
    cut, whole = trained_weights(given.out), trained_weights(tuned)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_recomputing_and_splitting_change_nothing(
    world: Path, stage1: Path, tuned: Path, tmp_path: Path
) -> None:
    tune = tune_of(tuned)
    train_run(stage2_config(world, stage1, tmp_path / "recomputed", tune, gradient_checkpointing=True))
    assert curve(tmp_path / "recomputed") == curve(tuned)
    train_run(stage2_config(world, stage1, tmp_path / "split", tune, micro_tokens=150))
    assert curve(tmp_path / "split") == pytest.approx(curve(tuned), rel=1e-4)


@pytest.mark.parametrize("tune", POLICIES)
def test_dropout_and_another_optimizer_resume_too(
    world: Path, stage1: Path, tmp_path: Path, tune: str
) -> None:
    """Muon moves the projector, AdamW the language model; dropout is a function of the step."""
    flags: dict[str, Any] = {"optimizer": "muon", "lora_dropout": 0.2, "eval_every": 1000, "save_every": 1000}
    whole = stage2_config(world, stage1, tmp_path / "whole", tune, **flags, max_steps=8)
    train_run(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut", save_every=4)
    train_run(cut)
    last = cut.out / "last"
    last.unlink()
    last.symlink_to("step-00000004")
    (cut.out / "summary.json").unlink()
    torch.manual_seed(5)
    train_run(cut)
    assert curve(cut.out) == curve(whole.out)
    figures = evaluate_run(
        EvalConfig(checkpoint=cut.out / "last", features=world / "held-out", llm=world / "llm")
    )
    assert figures["loss"] == pytest.approx(curve(cut.out, "eval_loss")[8], rel=1e-5)  # without dropout
    train_run(dataclasses.replace(whole, out=tmp_path / "none", lora_dropout=0.0))
    assert (curve(tmp_path / "none") == curve(whole.out)) == (tune == "llm")


@pytest.mark.parametrize("tune", POLICIES)
def test_each_has_a_rate_of_its_own(world: Path, stage1: Path, tmp_path: Path, tune: str) -> None:
    """AdamW's first step is as long as the rate."""
    given = stage2_config(world, stage1, tmp_path / tune / "run", tune, max_steps=1)
    train_run(dataclasses.replace(given, lr_llm=1e-6, weight_decay=0.0))
    now = load_file(given.out / "last" / WEIGHTS[tune])
    before = load_file(world / "llm/model.safetensors")
    moved = [now[name] - before[name] for name in now] if tune == "llm" else [
        value for name, value in now.items() if "lora_B" in name
    ]  # fmt: skip
    assert 0.5e-6 < max(float(change.abs().max()) for change in moved) < 1.5e-6
    projector, other = (load_file(folder / "model.safetensors") for folder in (stage1, given.out / "last"))
    assert max(float((projector[name] - other[name]).abs().max()) for name in other) > 1e-3


def test_a_damaged_part_is_refused(world: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "last", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / WEIGHTS[tune_of(tuned)]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert weights_sha256(tmp_path / "checkpoint") != weights_sha256(
        tuned / "last"
    )  # as --init it is another
    flags = (
        "--checkpoint",
        tmp_path / "checkpoint",
        "--features",
        world / "held-out",
        "--llm",
        world / "llm",
    )
    assert "is damaged, or was edited" in call("train", "eval", *flags, code=1).one_line()
    path.unlink()
    assert "cannot be read" in call("train", "eval", *flags, code=1).one_line()


@pytest.mark.parametrize("tune", POLICIES)
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    world: Path, stage1: Path, small_disk: Path, tmp_path: Path, tune: str
) -> None:
    """It fills while the second one is written; with space again the same command goes on."""
    given = stage2_config(world, stage1, small_disk / "out", tune, keep=1)
    train_run(dataclasses.replace(given, out=tmp_path / "sized"))
    files = [path for path in (tmp_path / "sized/last").rglob("*") if path.is_file()]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 3 * sum(path.stat().st_size for path in files) // 2))
    line = call("train", "run", *flags_of(given), code=1).err.splitlines()[-1]
    assert line.startswith(f"error: No space left on device: {given.out / 'step-'}")
    assert not list(given.out.glob("*.part"))
    assert (given.out / "last").resolve().name == "step-00000010"
    load_checkpoint(given.out / "last").require_whole()
    filler.unlink()
    call("train", "run", *flags_of(given))
    assert curve(given.out) == curve(tmp_path / "sized")


def test_what_does_not_belong_together_is_one_line(
    world: Path, stage1: Path, tuned: Path, tmp_path: Path
) -> None:
    tune = tune_of(tuned)
    other = write_language_model(tmp_path / "other", seed=5)
    line = call("train", "eval", "--checkpoint", tuned / "last", "--features", world / "held-out",
                "--llm", other, code=1).one_line()  # fmt: skip
    assert "another language model" in line
    with pytest.raises(LlavaError, match=f"was trained with --tune {tune}"):
        train_run(config(world, tmp_path / "run", init=tuned / "last"))
    with pytest.raises(LlavaError, match="no LoRA adapter fits"):
        train_run(config(world, tmp_path / "run", tune="lora", lora_targets="nothing"))
    for targets in ("lm_head", "embed_tokens,q_proj"):  # the head's would not train; both are one weight here
        flags = flags_of(config(world, tmp_path / "run", tune="lora", lora_targets=targets))
        line = call("train", "run", *flags, code=1).err.splitlines()[-1]
        assert "no LoRA adapter fits this language model; expected one of layers whose weight" in line
    if tune == "lora":
        with pytest.raises(
            LlavaError, match="has another lora_alpha; expected 8; got 32; give --lora-rank 4"
        ):
            train_run(
                stage2_config(world, tuned / "last", tmp_path / "run", tune, lora_alpha=8, save_every=5)
            )
    assert not (tmp_path / "run").exists()


def evaluated(world: Path, checkpoint: Path, code: int = 1) -> str:
    edited(checkpoint)
    flags = ("--features", world / "held-out", "--llm", world / "llm")
    ended = call("train", "eval", "--checkpoint", checkpoint, *flags, code=code)
    return ended.one_line() if code else ended.out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_weights_of_another_shape_or_no_numbers_are_refused(
    world: Path, tuned: Path, tmp_path: Path, value: float | None
) -> None:
    """In sealed files too, as whoever edited them wrote them: one number stands for no whole matrix."""
    shutil.copytree(tuned / "last", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / WEIGHTS[tune_of(tuned)]
    weights = load_file(path)
    name = min(weights)
    weights[name] = weights[name].flatten()[:1].clone() if value is None else weights[name] + value
    save_file(weights, path)
    assert "does not fit this language model" in evaluated(world, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(("},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"init_lora_weights": "loftq"},
    ],
)
def test_a_strange_adapter_config_is_one_line(
    world: Path, tuned: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    if tune_of(tuned) == "llm":
        pytest.skip("has no adapter")
    shutil.copytree(tuned / "last", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert "no LoRA adapter" in evaluated(world, tmp_path / "checkpoint")


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "q_proj,lm_head"])
def test_no_adapter_beside_weights_that_are_read_twice(world: Path, tmp_path: Path, targets: str) -> None:
    """Merged into a vocabulary head that shares the embeddings' weights, it would change both."""
    given = config(world, tmp_path / "run", tune="lora", lora_targets=targets)
    line = call("train", "run", *flags_of(given), code=1).one_line()
    assert "no LoRA adapter fits this language model; expected one of layers whose weight no other" in line


def test_an_adapter_goes_on_at_its_own_scale(world: Path, tuned: Path, tmp_path: Path) -> None:
    """Rank 4 and alpha 32 are what it began with; another factor changes what it adds, before any step."""
    if tune_of(tuned) == "llm":
        pytest.skip("has no adapter")
    for flags, flag in (({"lora_alpha": 64}, "another lora_alpha"), ({"lora_rank": 8}, "another r;")):
        given = stage2_config(world, tuned / "last", tmp_path / "run", "lora", max_steps=1, **flags)
        line = call("train", "run", *flags_of(given), code=1).one_line()
        assert flag in line
        assert "give --lora-rank 4 --lora-alpha 32, as it was trained" in line
    given = stage2_config(world, tuned / "last", tmp_path / "run", "lora", max_steps=1)
    train_run(given)
    assert curve(given.out, "eval_loss")[0] == curve(tuned, "eval_loss")[24]


@pytest.mark.parametrize("tune", POLICIES)
def test_runs_that_tune_share_no_step(world: Path, tmp_path: Path, tune: Any) -> None:
    """They would share one language model, too."""
    one, other = (config(world, tmp_path / str(lr), tune=tune, lr=lr) for lr in (0.01, 0.02))
    require_same_steps(one, one)
    with pytest.raises(LlavaError, match="runs that train together need --tune projector"):
        require_same_steps(one, other)
    assert not can_share_step({"tune": tune, "lr": 0.01}, {"tune": tune, "lr": 0.02})
    assert can_share_step({"tune": "projector", "lr": 0.01}, {"tune": "projector", "lr": 0.02})


def test_a_sweep_over_policies_gives_what_lone_runs_do(world: Path, stage1: Path, tmp_path: Path) -> None:
    """Each trial has the language model as it came: no trial sees what another has trained."""
    given = stage2_config(world, stage1, tmp_path / "sweep", "projector", max_steps=6)
    space = ("tune=llm,lora,projector", "seed=0,1")
    ended = call("train", "sweep", *flags_of(given), "--space", *space, "--together", 2)
    assert ended.err.count("--lr-llm does nothing here") == 2
    assert ended.err.count("--lora-rank does nothing here") == 4
    for trial in sorted((tmp_path / "sweep/trials").iterdir()):
        recorded = yaml.safe_load((trial / "training_config.yaml").read_text())
        lone = tmp_path / f"{recorded['tune']}-{recorded['seed']}"
        train_run(dataclasses.replace(given, out=lone, tune=recorded["tune"], seed=recorded["seed"]))
        assert curve(trial) == pytest.approx(curve(lone), rel=1e-5), recorded["tune"]


def test_what_a_trial_trained_whole_is_gone_before_the_next_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*given: Any) -> Any:
        assert all(known() is None for known in loaded)
        llm = load_language_model(*given)
        loaded.append(weakref.ref(next(llm.model.parameters())))
        return llm

    monkeypatch.setattr(resources, "load_language_model", load)
    given = config(world, tmp_path / "run", tune="llm")
    shared = resources.TrainingResources(given)
    shared.tune(given)
    shared.tune(given)
    assert len(loaded) == 2


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three models, and beside the projector's checkpoint one with a random LoRA adapter."""
    folders = write_aligned(tmp_path_factory.mktemp("aligned"))
    stage1, llm = load_checkpoint(folders.checkpoint), load_language_model(folders.llm)
    adapter = LoraAdapter.new(llm, rank=2, alpha=4, dropout=0.0, targets="all-linear")
    torch.manual_seed(1)
    for parameter in adapter.parameters:
        parameter.data.normal_(std=0.3)
    stage2 = folders.checkpoint.with_name("stage2")
    save_checkpoint(stage2, stage1.projector, stage1.provenance, {}, {}, None, adapter)
    return dataclasses.replace(folders, checkpoint=stage2)


def answers(folders: Folders, *flags: object) -> list[str]:
    greedy = ("--temperature", 0, "--max-tokens", 24)
    images = [part for image in folders.images for part in ("--image", image)]
    return run("infer", "ask", *folders.flags, *images, *greedy, *flags).out.splitlines()


def test_answers_with_and_without_an_adapter_share_no_file(aligned: Folders, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": str(aligned.images[0]), "prompt": "?"}) + "\n")
    command = (
        "infer",
        "batch",
        *aligned.flags,
        "--max-tokens",
        4,
        "--input",
        tmp_path / "q.jsonl",
        "--output",
    )
    merged, none = tmp_path / "merged.jsonl", tmp_path / "none.jsonl"
    for out, adapter, other in ((merged, "merge", "none"), (none, "none", "merge")):
        call(*command, out, "--adapter", adapter)
        before = out.read_bytes()
        call(*command, out, "--adapter", adapter)
        line = call(*command, out, "--adapter", other, code=1).one_line()
        assert "holds something else" in line
        assert f"with --adapter {other}" in line
        assert out.read_bytes() == before


def test_infer_answers_by_the_merged_adapter_or_without_it(aligned: Folders) -> None:
    stage1 = dataclasses.replace(aligned, checkpoint=aligned.checkpoint.with_name("last"))
    assert answers(aligned, "--adapter", "none") == answers(stage1)
    assert answers(aligned) != answers(stage1)
    merged = aligned.aligned()
    unmerged = load_language_model(aligned.llm)
    LoraAdapter.read(unmerged, aligned.checkpoint / "adapter")
    visual = merged.encode_files([image.read_bytes() for image in aligned.images])
    text = unmerged.embed(torch.arange(12)).expand(len(visual), -1, -1)
    embedded = torch.cat([visual, text], dim=1)
    with torch.inference_mode():
        ours, theirs = (
            model(inputs_embeds=embedded, use_cache=False).logits
            for model in (merged.llm.model, unmerged.model)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_answers_with_and_without_the_adapter_never_share_a_file(aligned: Folders, tmp_path: Path) -> None:
    lines = [json.dumps({"image": str(image), "texts": ["图", "画"]}) for image in aligned.images]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    for command in ("batch", "rank"):
        output = tmp_path / f"{command}.jsonl"
        flags = (*aligned.flags, "--input", tmp_path / "asked.jsonl", "--output", output)
        call("infer", command, *flags)
        assert {line["adapter"] for line in read_json_lines(output)} == {"merge"}
        refused = call("infer", command, *flags, "--adapter", "none", code=1)
        assert "holds something else" in refused.err.splitlines()[-1]


def test_python_and_export_take_it_merged(aligned: Folders, tmp_path: Path) -> None:
    model = AlignedModel.load(aligned.checkpoint, llm=aligned.llm, vision=aligned.vision, device="cpu")
    answer = model.answer(Image.open(aligned.images[0]), "看图", temperature=0, max_tokens=24)
    one = dataclasses.replace(aligned, images=aligned.images[:1])
    assert answers(one, "--prompt", "看图")[-1].endswith(answer.splitlines()[-1])
    losses = [
        AlignedModel.load(
            folder, llm=aligned.llm, vision=aligned.vision, device="cpu", tuned=folder != aligned.checkpoint
        ).loss(Image.open(aligned.images[0]), "图")
        for folder in (aligned.checkpoint, aligned.checkpoint.with_name("last"))
    ]
    assert losses[0] == losses[1] != model.loss(Image.open(aligned.images[0]), "图")
    models = ("--vision", aligned.vision, "--llm", aligned.llm)
    run("llava_align", "export", "--checkpoint", aligned.checkpoint, *models, "--out", tmp_path / "whole")
    assert "are merged into its weights" in (tmp_path / "whole/README.md").read_text(encoding="utf-8")
    exported = load_file(tmp_path / "whole/model.safetensors")
    merged = load_language_model(aligned.llm)
    load_checkpoint(aligned.checkpoint).tune_model(merged)
    name = "model.layers.0.mlp.up_proj.weight"
    own = merged.model.state_dict()[name]
    assert torch.equal(
        exported[f"language_model.{name}"].float(), own.to(exported[f"language_model.{name}"].dtype).float()
    )
    pushed = files_to_push(aligned.checkpoint, with_state=False)
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= pushed.keys()


def test_a_dialogue_over_the_context_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    """Positions that the model has never seen would spoil it without a word."""
    llm = shutil.copytree(world / "llm", tmp_path / "llm")
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 40}))
    given = config(world, tmp_path / "run", llm=llm, tune="lora")
    for command in ("plan", "run"):
        line = call("train", command, *flags_of(given), code=1).err.splitlines()[-1]
        assert "does not fit the language model's context; expected at most 40 tokens" in line
    assert not (tmp_path / "run").exists()
