"""Several encoders, or layers, fused at training time (--fuse), and projectors of them in every command."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import llava_align
from llava_core.filesystem import read_json_lines
from llava_core.projector.checkpoint import load_checkpoint, point_to
from llava_core.projector.projector import build_projector
from llava_core.row_status import Status
from llava_core.shards.folder import find_shards
from llava_core.shards.fused import open_fused
from llava_core.shards.hdf5_file import ShardHeader
from llava_core.shards.writer import RowRecord, ShardWriter
from llava_core.types import JsonDict
from llava_core.vision.fused import FusedTower, open_trained_towers
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call
from tests.support.features import CAPTIONS, write_features
from tests.support.llava_server import llava_server
from tests.support.runs import config, curve, flags_of, weights
from tests.support.shards import write_shard
from tests.support.vision_encoders import VISION, write_vision_folder

WIDER = {**VISION, "vision_width": 128, "image_resolution": 48, "vision_patch_size": 24}
"""Another encoder of 2x2 patches, twice as wide, on larger pictures."""
FINER = {**WIDER, "vision_patch_size": 16}
"""One of 3x3 patches."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """Pictures, their features by encoders and layers, and a run of each kind of fusion on them."""

    world: Folders
    wider: Path
    root: Path

    def folders(self, kind: str, held_out: bool = False) -> tuple[Path, ...]:
        names = {"channels": ("clip", "wider"), "tokens": ("clip", "finer"), "layers": ("clip", "clip@1")}[
            kind
        ]
        return tuple(self.root / f"{'held-out/' if held_out else ''}{name}" for name in names)

    def config(self, kind: Any, out: Path, **flags: Any) -> Any:
        held_out = self.folders(kind, held_out=True)[::-1]  # in another order
        given: dict[str, Any] = {"llm": self.world.llm, "batch_size": 2, "epochs": 4, "eval_every": 4}
        caches = {"features": self.folders(kind), "eval_features": held_out, "fuse": kind}
        return config(self.root, out, **{**given, **caches, **flags})

    def vision(self, kind: str) -> tuple[Path, ...]:
        """The model folders, in another order than they were trained."""
        others = {"channels": (self.wider,), "tokens": (self.root / "finer-model",), "layers": ()}[kind]
        return *others, self.world.vision

    def models(self, kind: str) -> tuple[object, ...]:
        return "--checkpoint", self.root / f"runs/{kind}/last", "--llm", self.world.llm

    def rows(self) -> list[int]:
        return [row for row in range(len(CAPTIONS)) if row != 1]  # DEAD


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Fused:
    root = tmp_path_factory.mktemp("fused")
    world = write_aligned(root / "world")
    made = Fused(world, write_vision_folder(root / "wider-model", vision=WIDER, seed=1), root)
    finer = write_vision_folder(root / "finer-model", vision=FINER, seed=2)
    for folder in (root, root / "held-out"):
        write_features(world, folder / "clip/part.h5")
        write_features(world, folder / "clip@1/part.h5", layer=1)
        write_features(dataclasses.replace(world, vision=made.wider), folder / "wider/part.h5")
        write_features(dataclasses.replace(world, vision=finer), folder / "finer/part.h5")
    for kind in ("channels", "tokens", "layers"):
        call("train", "run", *flags_of(made.config(kind, root / f"runs/{kind}")))
    return made


KINDS = pytest.mark.parametrize("kind", ["channels", "tokens", "layers"])


@KINDS
def test_answers_about_a_live_picture_are_those_about_its_cached_rows(
    fused: Fused, kind: str, tmp_path: Path
) -> None:
    models, caches = fused.models(kind), fused.folders(kind)[::-1]
    flags = (*models, "--max-tokens", 8)
    out, images = tmp_path / "out.jsonl", [fused.world.images[row] for row in fused.rows()]
    ended = call("infer", "batch", *flags, "--features", *caches, "--output", out)
    assert f"{' + '.join(map(str, caches[::-1]))} → " in ended.err
    cached = [line["answer"] for line in read_json_lines(out)]
    assert len(set(cached)) > 2  # the picture matters
    asked = [part for image in images for part in ("--image", image)]
    vision = ("--vision", *fused.vision(kind))
    live = call("infer", "ask", *flags, *vision, *asked, "--json").summary
    assert [line["answer"] for line in live["answers"]] == cached
    lines = tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps({"image": str(image)}) + "\n" for image in images))
    call("infer", "batch", *flags, *vision, "--input", lines, "--output", tmp_path / "live.jsonl")
    assert [line["answer"] for line in read_json_lines(tmp_path / "live.jsonl")] == cached
    call("infer", "rank", *models, "--features", *caches, "--output", tmp_path / "r.jsonl", "--choices", 2)
    ranked = read_json_lines(tmp_path / "r.jsonl")
    assert len(ranked) == 3
    folder = fused.root / f"runs/{kind}/last"
    model = llava_align.AlignedModel.load(folder, llm=fused.world.llm, vision=list(fused.vision(kind)))
    assert model.answer(images[0], max_tokens=8) == cached[0]
    for line in ranked:
        own = model.rank(fused.world.images[line["row"]], line["texts"], line["prompt"])
        assert {choice.index: choice.loss for choice in own} == pytest.approx(
            dict(enumerate(line["losses"])), abs=1e-4
        )


def test_chat_serve_and_lens(fused: Fused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = (*fused.models("channels"), "--vision", *fused.vision("channels"))
    image = fused.world.images[0]
    answer = call("infer", "ask", *models, "--max-tokens", 8, "--image", image, "--json").summary["answer"]
    question = "请描述这张图片。"
    asked = call("infer", "ask", *models, "--max-tokens", 8, "--image", image, "--prompt", question, "--json")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n"))
    ended = call("infer", "chat", *models, "--max-tokens", 8, "--image", image)
    assert ended.out.strip() == asked.summary["answer"]
    data = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    with llava_server(*models, "--model-id", "fused") as served:
        request = urllib.request.Request(
            f"{served.base}/v1/chat/completions",
            json.dumps({"model": "fused", "max_tokens": 8, "messages": messages}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            said = json.load(response)["choices"][0]["message"]["content"]
    assert said.strip() == asked.summary["answer"]
    call("infer", "lens", *models, "--image", image, "--caption", answer or "圆", "--out", tmp_path / "lens")
    assert (tmp_path / "lens.png").exists()
    tokens = (*fused.models("tokens"), "--vision", *fused.vision("tokens"))
    line = call("infer", "lens", *tokens, "--image", image, "--out", tmp_path / "no", code=1).one_line()
    assert line == (
        "error: the lens draws one grid of visual tokens; expected --fuse channels or layers; "
        "got a projector of --fuse tokens"
    )


def by_hand(parts: tuple[Path, ...], folder: Path) -> Path:
    """A cache whose features are those of two, side by side."""
    first, second = (find_shards(part) for part in parts)
    for one, other in zip(first, second, strict=True):
        width, ok = one.width + other.width, (one.status == Status.OK) & (other.status == Status.OK)
        encoder: JsonDict = {**one.encoder, "model_id": "both", "weights_sha256": "7" * 64, "width": width}
        header = ShardHeader(
            encoder=encoder,
            preprocess=one.preprocess,
            source=one.source,
            tokens=one.tokens,
            width=width,
            captions=[one.caption(row) for row in range(one.rows)],
            urls=one.urls(),
            ids=one.ids(),
        )
        folder.mkdir(parents=True, exist_ok=True)
        with ShardWriter(folder / one.path.name, header) as writer:
            for row in range(one.rows):
                if not ok[row]:
                    writer.write([RowRecord(row, Status.HTTP_4XX, http=404)])
                    continue
                both = np.concatenate([one.read(row), other.read(row)], 1)
                digest = one.sha256[row].tobytes()
                writer.write([RowRecord(row, Status.OK, both, 200, 1, 9, (30, 40), digest)])
            writer.finish()
    return folder


@pytest.fixture(scope="module")
def caches(world: Path) -> Path:
    """Beside the world's folders the same rows by another encoder, which has failed at others."""
    write_shard(world / "other/a.h5", rows=26, failed=[5], seed=5, size=48)
    write_shard(world / "other/b.h5", rows=25, seed=6, size=48)
    write_shard(world / "other-held-out/c.h5", rows=10, seed=7, size=48)
    return world


def two(world: Path, out: Path, **flags: Any) -> Any:
    given: dict[str, Any] = {
        "features": (world / "features", world / "other"),
        "eval_features": (world / "held-out", world / "other-held-out"),
        "fuse": "channels",
        "max_steps": 12,
    }
    return config(world, out, **{**given, **flags})


def test_channels_are_training_on_features_put_side_by_side_to_the_bit(caches: Path, tmp_path: Path) -> None:
    ended = call("train", "run", *flags_of(two(caches, tmp_path / "fused")))
    assert f"4 rows failed in some of {caches / 'features'}, {caches / 'other'}: left out in all" in ended.err
    assert "fused: random (1) [5, 12] + random (2) [5, 12] by channels" in ended.err
    assert "trained: linear projector 24→32 (800 parameters)" in ended.err
    plain = {
        "features": by_hand((caches / "features", caches / "other"), tmp_path / "both"),
        "eval_features": by_hand(
            (caches / "held-out", caches / "other-held-out"), tmp_path / "both-held-out"
        ),
    }
    call("train", "run", *flags_of(two(caches, tmp_path / "by-hand", fuse=None, **plain)))
    for key in ("loss", "eval_loss", "eval_grounding_gap"):
        assert curve(tmp_path / "fused", key) == curve(tmp_path / "by-hand", key)
    own = weights(tmp_path / "fused")
    assert own.keys() == weights(tmp_path / "by-hand").keys()
    assert all(torch.equal(own[name], other) for name, other in weights(tmp_path / "by-hand").items())
    for name, folders in (("fused", two(caches, tmp_path).eval_features[::-1]), ("by-hand", None)):
        judged = folders or (plain["eval_features"],)
        flags = ("--checkpoint", tmp_path / name / "last", "--llm", caches / "llm", "--features", *judged)
        figures = call("train", "eval", *flags, "--instructions", "mixed", "--json").summary
        assert figures["loss"] == pytest.approx(curve(tmp_path / name, "eval_loss")[12], abs=1e-6)
    planned = [
        call("train", "plan", *flags_of(two(caches, tmp_path / "p", **changed)), "--json").summary
        for changed in ({}, {**plain, "fuse": None})
    ]
    same = ("samples", "steps", "trained_parameters", "operations_per_step", "feature_bytes_per_epoch")
    assert [planned[0][key] for key in same] == [planned[1][key] for key in same]


def test_channels_leave_out_the_class_token_that_one_encoder_lacks(fused: Fused, tmp_path: Path) -> None:
    """As DINOv2 and SigLIP are fused in prismatic-vlms: patch beside patch."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    siglip = tmp_path / "siglip-model"
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(siglip)
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(siglip)
    for name in ("siglip", "held-out/siglip"):
        write_features(dataclasses.replace(fused.world, vision=siglip), tmp_path / name / "part.h5")
    caches = (fused.root / "clip", tmp_path / "siglip")
    given = fused.config("channels", tmp_path / "run", features=caches)
    held_out = (tmp_path / "held-out/siglip", fused.root / "held-out/clip")
    ended = call("train", "run", *flags_of(dataclasses.replace(given, eval_features=held_out)))
    assert ended.err.count("class token of vision left out, since another encoder has none") == 1
    assert "visual tokens: all (4→4)" in ended.err
    (shard,), (clip,), (other,) = open_fused(caches, "channels"), *map(find_shards, caches)
    for row in fused.rows():
        assert np.array_equal(shard.read(row), np.concatenate([clip.read(row)[1:], other.read(row)], 1))
    models = ("--checkpoint", tmp_path / "run/last", "--llm", fused.world.llm, "--device", "cpu")
    flags, out = (*models, "--max-tokens", 8), tmp_path / "out.jsonl"
    call("infer", "batch", *flags, "--features", *caches, "--output", out)
    asked = [part for row in fused.rows() for part in ("--image", fused.world.images[row])]
    live = call("infer", "ask", *flags, "--vision", siglip, fused.world.vision, *asked, "--json").summary
    answers = [line["answer"] for line in live["answers"]]
    assert answers == [line["answer"] for line in read_json_lines(out)]
    assert len(set(answers)) > 1


def test_tokens_of_unlike_widths_have_weights_of_their_own(fused: Fused) -> None:
    shards = open_fused(fused.folders("tokens"), "tokens")
    fusion = shards[0].identity.fusion
    assert fusion is not None
    parts = [find_shards(folder)[0] for folder in fused.folders("tokens")]
    assert (shards[0].tokens, shards[0].width) == (5 + 10, 128)
    for name, kept in {"all": (5, 10), "patches": (4, 9)}.items():
        projector = build_projector("linear", 128, 32, name, fusion=fusion.to_json())
        assert projector.tokens_out(15) == sum(kept)
        weight, bias = projector.map.weight, projector.map.bias
        first, second = (
            torch.from_numpy(part.read(0)).float()[-n:] for part, n in zip(parts, kept, strict=True)
        )
        assert isinstance(weight, torch.Tensor)
        assert isinstance(bias, torch.Tensor)
        expected = torch.cat([first @ weight[:, :64].T, second @ weight[:, 64:].T]) + bias
        got = projector(torch.from_numpy(shards[0].read(0)).float())
        assert torch.allclose(got, expected, atol=1e-5)


def test_layers_learn_their_weights(fused: Fused, tmp_path: Path) -> None:
    given = fused.config("layers", tmp_path / "run", lr=0.2)
    ended = call("train", "run", *flags_of(given), "--json")
    assert "trained: linear projector 64→" in ended.err  # what its layer is given: the mean of two layers
    names = [f"layer_weight/{name}" for name in ("vision", "vision@1")]
    learnt = [ended.summary[name] for name in names]
    assert sum(learnt) == pytest.approx(1)
    assert abs(learnt[0] - 0.5) > 0.01
    assert f"weights of the layers: vision {learnt[0]:.3f}, vision@1 {learnt[1]:.3f}" in ended.err
    lines = read_json_lines(given.out / "metrics.jsonl")
    logged = {line["step"]: line[names[0]] for line in lines if names[0] in line}
    assert (logged[0], logged[max(logged)]) == (0.5, learnt[0])
    assert json.loads((given.out / "last/metrics.json").read_text())[names[0]] == learnt[0]
    assert weights(given.out)["layer_mix.logits"].softmax(0).tolist() == pytest.approx(learnt)


def test_the_mean_of_mixed_layers_is_subtracted(fused: Fused, tmp_path: Path) -> None:
    given = fused.config("layers", tmp_path / "run", feature_norm="center", visual_tokens="pool")
    call("train", "run", *flags_of(given))
    shards = [find_shards(folder)[0] for folder in fused.folders("layers")]
    rows = [row for row in shards[0].ok_rows() if shards[0].caption(row)]
    pooled = [[shard.read(row)[1:].astype("f4").mean(0) for row in rows] for shard in shards]
    expected = torch.from_numpy(np.mean(pooled, axis=(0, 1)))
    assert torch.allclose(weights(given.out)["feature_norm.mean"], expected, atol=1e-4)
    line = call("train", "run", *flags_of(given), "--fuse", "tokens", code=2).one_line()
    assert "--fuse tokens beside --feature-norm center; each encoder's tokens" in line


@pytest.mark.parametrize("kind", ["ldp", "tokenpacker", "cabstractor4"])
def test_grids_one_after_another_are_not_taken_for_one(fused: Fused, tmp_path: Path, kind: str) -> None:
    caches = [fused.root / "clip", *(tmp_path / f"{seed}" for seed in (5, 6, 7))]
    for folder in caches[1:]:
        vision = write_vision_folder(tmp_path / f"model{folder.name}", seed=int(folder.name))
        write_features(dataclasses.replace(fused.world, vision=vision), folder / "part.h5")
    flags = {"features": tuple(caches), "eval_features": None, "visual_tokens": "patches"}  # 4 x 2x2 is 4x4
    given = fused.config("tokens", tmp_path / "run", projector=kind, **flags)
    line = call("train", "run", *flags_of(given), code=1).one_line()
    assert f"--projector {kind} takes one grid of patches; got 4 one after another (--fuse tokens)" in line


def test_a_fused_run_resumes_bit_equal(fused: Fused, tmp_path: Path) -> None:
    whole = fused.config("layers", tmp_path / "whole", save_every=2, keep=9)
    call("train", "run", *flags_of(whole))
    cut = shutil.copytree(whole.out, tmp_path / "cut", symlinks=True)
    (cut / "summary.json").unlink()
    for link in ("last", "best"):
        point_to(cut / link, cut / "step-00000002")
    call("train", "run", *flags_of(dataclasses.replace(whole, out=cut)), "--resume")
    assert all(torch.equal(weights(cut)[name], own) for name, own in weights(whole.out).items())


def test_another_order_of_the_encoders_is_said(fused: Fused, tmp_path: Path) -> None:
    last = fused.root / "runs/channels/last"
    given = fused.config("channels", tmp_path / "run", init=last)
    given = dataclasses.replace(given, features=given.features[::-1])
    line = call("train", "run", *flags_of(given), code=1).one_line()
    assert line.endswith("name the folders in the order it was trained on: vision, wider-model")


def test_words_are_those_of_the_first_folder(caches: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "words/c.h5", rows=10, seed=8, size=96, caption="另一段")
    flags: dict[str, Any] = {
        "features": (caches / "held-out", tmp_path / "words"),
        "eval_features": None,
        "max_steps": 2,
    }
    err = call("train", "run", *flags_of(two(caches, tmp_path / "run", **flags))).err
    line = f"10 rows with other texts in some of the folders: those of {caches / 'held-out'} are read"
    assert err.count(line) == 1
    batch = (
        "infer",
        "batch",
        "--checkpoint",
        tmp_path / "run/last",
        "--llm",
        caches / "llm",
        "--max-tokens",
        2,
    )
    for folders in (flags["features"], flags["features"][::-1]):
        out = tmp_path / f"{folders[0].name}.jsonl"
        call(*batch, "--features", *folders, "--output", out)
        captions = [line["caption"] for line in read_json_lines(out)]
        assert captions == [find_shards(folders[0])[0].caption(row) for row in range(10)]
    both = [[line["answer"] for line in read_json_lines(path)] for path in sorted(tmp_path.glob("*.jsonl"))]
    assert len(both) == 2
    assert both[0] == both[1]


def test_words_of_a_table_are_joined_to_fused_features(caches: Path, tmp_path: Path) -> None:
    table = tmp_path / "words.jsonl"
    table.write_text("".join(json.dumps({"id": str(row), "text": f"红色{row}"}) + "\n" for row in range(10)))
    given = two(caches, tmp_path / "run", features=two(caches, tmp_path).eval_features, text=str(table))
    ended = call("train", "run", *flags_of(given))
    assert "10 texts joined by id" in ended.err
    assert "10 samples, features kept on cpu" in ended.err


def test_a_sweep_compares_caches(caches: Path, tmp_path: Path) -> None:
    given = two(caches, tmp_path / "sweep", max_steps=4)
    space = ("--space", "features=features,other,features+other", "lr=0.01,0.02", "--together", 2)
    ended = call("train", "sweep", *flags_of(given), *space, "--json")
    assert (ended.summary["trials"], ended.summary["finished"]) == (6, 6)
    assert "of 5 other points" in ended.err
    assert "kept no losses of the same rows" not in ended.err  # paired by picture, whatever encoded it
    names = {"features": ("held-out", "features"), "other": ("other-held-out", "other")}
    for line in read_json_lines(given.out / "results.jsonl"):
        if line["lr"] != 0.02:
            continue
        own = line["features"].split("+")
        alone: dict[str, Any] = {
            "features": tuple(caches / names[name][1] for name in own),
            "eval_features": tuple(caches / names[name][0] for name in own),
            "fuse": "channels" if len(own) > 1 else None,
        }
        out = tmp_path / f"alone-{line['features']}"
        call("train", "run", *flags_of(two(caches, out, max_steps=4, lr=0.02, **alone)))
        assert line["eval_loss"] == pytest.approx(curve(out, "eval_loss")[4], rel=1e-5)
    again = call("train", "sweep", *flags_of(given), *space)
    assert "0 trials left" in again.err


@pytest.mark.parametrize(
    ("flags", "space", "message"),
    [
        ({}, "features=features,x", "expected folders of --features, or A+B of them: features, other; got x"),
        ({"fuse": None}, "features=features,features+other", "expected --fuse channels, tokens or layers"),
    ],
)
def test_space_names_what_it_cannot_compare(
    caches: Path, tmp_path: Path, flags: dict[str, Any], space: str, message: str
) -> None:
    given = two(caches, tmp_path / "sweep", **flags)
    line = call("train", "sweep", *flags_of(given), "--space", space, code=2).one_line()
    assert message in line


def test_a_sweep_names_the_trial_that_cannot_be(caches: Path, tmp_path: Path) -> None:
    given = two(caches, tmp_path / "sweep", fuse="tokens")
    space = ("--space", "features=features,features+other", "projector=linear,ldp")
    line = call("train", "sweep", *flags_of(given), *space, code=1).one_line()
    assert line.startswith("error: --space features=")
    assert "projector=ldp: " in line


def test_a_sweep_wants_held_out_rows_of_each_encoder(caches: Path, tmp_path: Path) -> None:
    given = two(caches, tmp_path / "sweep", fuse=None, eval_features=caches / "held-out")
    line = call("train", "sweep", *flags_of(given), "--space", "features=features,other", code=1).one_line()
    assert f"no held-out shards of the encoder of {caches / 'other'}" in line


def test_wrong_usage_of_fuse(caches: Path, tmp_path: Path) -> None:
    first, second, held_out = caches / "features", caches / "other", caches / "held-out"
    both = ("--features", first, second)
    as_many = "expected a folder of --eval-features for each of the 2 of --features; got 1"
    for flags, message in (
        (
            ("--features", first),
            "expected a folder of --features for each encoder or layer, two or more; got 1",
        ),
        ((*both, "--eval-features", held_out), as_many),
        ((*both, "--mix", "0.5,0.5"), "--fuse channels beside --mix; expected one of them"),
        (("--features", first, first), f"--features names shards twice; got {first} twice"),
    ):
        given = ("--llm", caches / "llm", "--out", tmp_path / "no", "--fuse", "channels")
        assert message in call("train", "run", *given, *flags, code=2).one_line()
    assert not (tmp_path / "no").exists()


def test_caches_that_do_not_fit_together(fused: Fused, caches: Path, tmp_path: Path) -> None:
    def refused(kind: str, *folders: Path) -> str:
        given = two(caches, tmp_path / "no", features=folders, eval_features=None, fuse=kind)
        return call("train", "run", *flags_of(given), code=1).one_line()

    root = fused.root
    line = refused("channels", root / "clip", root / "finer")
    assert line == (
        "error: --fuse channels; expected encoders of one grid; got vision 5 tokens (2x2 patches and a class "
        "token), finer-model 10 tokens (3x3 patches and a class token); "
        "give --fuse tokens, which takes any tokens"
    )
    line = refused("layers", root / "clip", root / "wider")
    assert "expected features of one width; got vision 64, wider-model 128" in line
    line = refused("channels", root / "clip", shutil.copytree(root / "clip", tmp_path / "copy"))
    assert "--fuse channels: features of one kind twice; got vision (" in line
    write_shard(tmp_path / "short/a.h5", rows=25, seed=5, size=48)
    write_shard(tmp_path / "short/b.h5", rows=25, seed=6, size=48)
    line = refused("channels", caches / "features", tmp_path / "short")
    assert "short/a.h5 are not of the same rows; expected 26 rows; got 25" in line
    (tmp_path / "short/a.h5").unlink()
    line = refused("channels", caches / "features", tmp_path / "short")
    assert f"expected the same shards in each, for --fuse: a.h5 of {caches / 'features'}" in line
    write_shard(tmp_path / "size/part.h5", rows=5, size=48)
    line = refused("tokens", root / "clip", tmp_path / "size")
    assert "are not of the same rows; expected none; got 0 as the id of row 0" in line


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("infer", "ask", "--image"), 1),
        (("infer", "batch", "--output"), 1),
        (("infer", "rank", "--output"), 1),
        (("train", "eval"), 1),
    ],
    ids=lambda each: "-".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_what_is_missing_is_named(fused: Fused, tmp_path: Path, command: tuple[str, ...], code: int) -> None:
    module, verb, *more = command
    live = "--image" in more
    values = {"--image": fused.world.images[0], "--output": tmp_path / "o.jsonl"}
    rest = [part for flag in more for part in (flag, values[flag])]
    flag, clip, wider, finer = "--features", *(fused.root / name for name in ("clip", "wider", "finer"))
    if live:
        flag, clip, wider, finer = "--vision", fused.world.vision, fused.wider, fused.root / "finer-model"
    wanted = "expected vision [5, 64] + wider-model [5, 128] by channels ("
    do = "give a folder of each of the 2, in any order"
    for given, lacking in {(clip,): "wider-model", (wider,): "vision", (clip, finer): "wider-model"}.items():
        line = call(module, verb, *fused.models("channels"), flag, *given, *rest, code=code).one_line()
        assert line.startswith(f"error: {flag} lacks {lacking} (")
        assert wanted in line
        assert line.endswith(do)
    if live:
        line = call(
            module, verb, *fused.models("channels"), flag, clip, wider, finer, *rest, code=1
        ).one_line()
        assert line.endswith(f"got {finer}; leave those out")
    else:
        line = call(
            module, verb, *fused.models("channels"), flag, clip, wider, finer, *rest, code=1
        ).one_line()
        assert "got finer-model (" in line
    assert not (tmp_path / "o.jsonl").exists() or not (tmp_path / "o.jsonl").read_text()


def test_one_folder_has_all_layers(fused: Fused) -> None:
    given = (*fused.models("layers"), "--vision", fused.wider, "--image", fused.world.images[0])
    line = call("infer", "ask", *given, code=1).one_line()
    assert line.endswith("give the folder of vision, which has all these layers")


def test_one_encoder_takes_no_several(fused: Fused, tmp_path: Path) -> None:
    models = ("--checkpoint", fused.world.checkpoint, "--llm", fused.world.llm)
    vision = ("--vision", fused.world.vision, fused.wider)
    line = call("infer", "ask", *models, *vision, "--image", fused.world.images[0], code=1).one_line()
    assert "--vision: this projector was trained on vision (" in line
    caches = ("--features", *fused.folders("channels"))
    line = call("infer", "batch", *models, *caches, "--output", tmp_path / "o.jsonl", code=1).one_line()
    assert "alone; expected one folder, or a shard of it; got 2" in line


def test_what_cannot_take_several_refuses_by_name(fused: Fused, tmp_path: Path) -> None:
    models = (*fused.models("channels"), "--vision", fused.world.vision)
    for module, verb, *more in (
        ("llava_align", "export", "--out", tmp_path / "out"),
        ("llava_align", "trace"),
    ):
        line = call(module, verb, *models, *more, code=1).one_line()
        assert line.startswith(
            "error: this command takes no projector of several encoders; expected one that"
        )
        assert "got vision [5, 64] + wider-model [5, 128] by channels (" in line
    assert list(tmp_path.iterdir()) == []
    written = json.loads((fused.root / "runs/channels/last/config.json").read_text())
    assert written["version"] == 4  # which earlier programs refuse
    card = (fused.root / "runs/channels/last/README.md").read_text()
    assert "--vision ENCODER ENCODER --llm" in card


def test_layers_of_one_encoder_take_one_network_and_one_pass(fused: Fused) -> None:
    checkpoint = load_checkpoint(fused.root / "runs/layers/last")
    tower = open_trained_towers(fused.vision("layers"), checkpoint.provenance)
    assert isinstance(tower, FusedTower)
    first, second = tower.towers
    assert first.network is second.network
    passes: list[object] = []
    first.network.get_submodule("visual").register_forward_hook(lambda *_: passes.append(1))
    image = tower.decode(fused.world.images[0].read_bytes())
    features = tower.encode_images([image])[0]
    assert len(passes) == 1
    alone = [each.encode(image.pixels[None])[0] for each in tower.towers]
    assert torch.equal(features, torch.cat(alone, dim=-1))
