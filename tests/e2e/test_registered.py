"""A projector, visual tokens and an encoder of one's own, through every command that loads them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_core.errors import LlavaError
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.projector.projector import build_projector, match_scale, parameter_count
from llava_core.registry import PROJECTORS, VISUAL_TOKENS
from tests.support.aligned import Folders, write_aligned
from tests.support.commands import call, run, run_each
from tests.support.entry_points import install
from tests.support.features import write_features
from tests.support.paths import ROOT

MINE = '''
import torch
from torch import nn
from llava_align import register_projector, register_visual_tokens

@register_projector("deep", depth=2)
class Gated(nn.Module):
    """A gate for each number, then a linear layer."""
    def __init__(self, in_width, out_width, depth=1):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(in_width, in_width) for _ in range(depth))
        self.last = nn.Linear(in_width, out_width)

    def forward(self, features):
        for gate in self.gates:
            features = features * torch.sigmoid(gate(features))
        return self.last(features)

class Dropping(nn.Sequential):
    def __init__(self, in_width, out_width):
        super().__init__(nn.Linear(in_width, out_width), nn.Dropout(0.5))

class Doubled(nn.Linear):
    def forward(self, features):
        return torch.cat([super().forward(features)] * 2, -1)

class Odd:
    """Every second token."""
    widening = 1
    def __call__(self, features):
        return features[..., 1::2, :]
    def tokens_out(self, tokens):
        return tokens // 2

@register_visual_tokens("every4", step=4)
class Every:
    """Every so many tokens."""
    def __init__(self, step=2):
        self.step = step
    @property
    def widening(self):
        return 1
    def __call__(self, features):
        return features[..., :: self.step, :]
    def tokens_out(self, tokens):
        return len(range(0, tokens, self.step))

class Needy(Every):
    def __init__(self, step):
        self.step = step

class Uncounted(Every):
    def tokens_out(self, tokens):
        return tokens // 0

def factory(in_width, out_width):
    return nn.Linear(in_width, out_width)
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    world = write_aligned(tmp_path_factory.mktemp("own"))
    write_features(world, world.llm.parent / "features/a.h5")
    return world


@pytest.fixture(scope="module")
def here(world: Folders) -> Path:
    """A folder with the module, where commands are run."""
    (world.llm.parent / "here").mkdir()
    (world.llm.parent / "here/my_parts.py").write_text(MINE, encoding="utf-8")
    return world.llm.parent / "here"


@pytest.fixture
def _in_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for `python -m` there, and forgotten afterwards."""
    monkeypatch.chdir(here)
    yield
    sys.modules.pop("my_parts", None)
    PROJECTORS.registered.clear()
    VISUAL_TOKENS.registered.clear()


def trained(world: Folders, here: Path, name: str, *flags: object) -> Path:
    features = world.llm.parent / "features"
    call(
        *("train", "run", "--features", features, "--llm", world.llm, "--device", "cpu", "--batch-size", 2),
        *("--out", here / name, "--max-steps", 2, *flags),
    )
    return here / name / "last"


@pytest.mark.usefixtures("_in_its_folder")
def test_a_class_of_ones_own_trains_answers_explains_and_is_exported(world: Folders, here: Path) -> None:
    mine = ("--projector", "my_parts:Gated", "--visual-tokens", "my_parts:Odd")
    checkpoint = trained(world, here, "run", *mine)
    recorded = json.loads((checkpoint / "config.json").read_text())["projector"]
    assert (recorded["kind"], recorded["visual_tokens"]) == ("my_parts:Gated", "my_parts:Odd")
    assert set(load_file(checkpoint / "model.safetensors")) == {
        "gates.0.weight", "gates.0.bias", "last.weight", "last.bias"
    }  # fmt: skip
    models = ("--checkpoint", checkpoint, "--vision", world.vision, "--llm", world.llm, "--device", "cpu")
    image = ("--image", world.images[0])
    assert call("infer", "ask", *models, *image, "--json").summary["answer"]
    lens = call("infer", "lens", *models, *image, "--out", here / "lens", "--json").summary
    assert lens["loss"] > 0
    exported = here / "exported"
    call("llava_align", "export", *models[:6], "--out", exported)
    code = (
        "import sys, transformers; model = transformers.AutoModelForImageTextToText.from_pretrained("
        "sys.argv[1], trust_remote_code=True); print(type(model.projector).__name__)"
    )
    command = [sys.executable, "-c", code, str(exported)]
    loaded = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert loaded.stdout == "Gated\n", loaded.stderr
    elsewhere = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "No module named 'my_parts'" in elsewhere.stderr


@pytest.mark.usefixtures("_in_its_folder")
def test_dropout_of_ones_own_is_off_where_it_is_judged(world: Folders, here: Path) -> None:
    features = world.llm.parent / "features"
    mine = ("--projector", "my_parts:Dropping", "--start", "torch", "--eval-features", features, "--json")
    checkpoint = trained(world, here, "dropping", *mine)
    summary = json.loads((checkpoint.parent / "summary.json").read_text())
    models = ("--checkpoint", checkpoint, "--llm", world.llm, "--device", "cpu")
    judged = call("train", "eval", *models, "--features", features, "--json").summary
    assert judged["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)


@pytest.mark.usefixtures("_in_its_folder")
def test_another_process_that_lacks_the_module_says_which(world: Folders, here: Path) -> None:
    checkpoint = trained(world, here, "lacking", "--projector", "my_parts:Gated")
    models = ("--checkpoint", checkpoint, "--vision", world.vision, "--llm", world.llm, "--device", "cpu")
    line = run("infer", "ask", *models, "--image", world.images[0], code=1).one_line()
    assert f"the checkpoint {checkpoint} cannot be loaded: the projector my_parts:Gated cannot" in line
    assert "got no module named 'my_parts'" in line
    assert "run where my_parts.py lies" in line


@pytest.mark.usefixtures("_in_its_folder")
def test_registered_arguments_come_back_with_the_checkpoint(world: Folders, here: Path) -> None:
    VISUAL_TOKENS.get("my_parts:Every")  # imports the module, which registers its names
    mine = ("--projector", "deep", "--visual-tokens", "every4")
    checkpoint = trained(world, here, "every", *mine)
    trained(world, here, "from", *mine, "--init", checkpoint)
    flags = ("--features", world.llm.parent / "features", "--llm", world.llm, "--device", "cpu")
    again = (*("train", "run", *flags, "--batch-size", 2, "--out", here / "every", "--max-steps", 2), *mine)
    other = ("--projector", "deep", "--visual-tokens", "my_parts:Every", "--init", checkpoint)
    refused = call("train", "run", *flags, "--out", here / "other", *other, code=1).one_line()
    assert "holds another projector" in refused
    words = "my_parts:Gated, visual tokens my_parts:Every{}, depth 2"
    both = words.format(""), words.format(", visual tokens arguments {'step': 4}")
    assert "; expected {}; got {}; give --projector deep --visual-tokens every4".format(*both) in refused

    VISUAL_TOKENS.registered.pop("every4")
    PROJECTORS.registered.clear()
    loaded = load_checkpoint(checkpoint).projector  # as in a process that knows neither name
    assert loaded.config["visual_tokens_arguments"] == {"step": 4}
    assert loaded.tokens_out(9) == 3
    models = ("--checkpoint", checkpoint, "--vision", world.vision, "--llm", world.llm)
    call("llava_align", "export", *models, "--out", here / "every-exported")
    code = (
        "import json, sys, torch, transformers; folder = sys.argv[1]\n"
        "model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)\n"
        "processor = json.load(open(folder + '/processor_config.json'))\n"
        "side = processor['preprocess']['size']\n"
        "print(model.get_image_features(torch.zeros(1, 3, side, side)).shape[1], processor['visual_tokens'])"
    )
    exported = [sys.executable, "-c", code, str(here / "every-exported")]
    counted = subprocess.run(exported, cwd=here, capture_output=True, text=True)
    encoder = load_checkpoint(checkpoint).provenance.encoder.encoder
    assert counted.stdout.split() == [str(loaded.tokens_out(encoder["tokens"]))] * 2, counted.stderr

    PROJECTORS.register("deep", depth=2)(type(loaded.map))
    VISUAL_TOKENS.register("every4", step=3)(type(loaded.select))
    (here / "every/summary.json").unlink()
    changed = call(*again, code=1).one_line()
    assert f"the run in {here / 'every'} began with other registered arguments; expected {both[1]}" in changed


@pytest.mark.usefixtures("_in_its_folder")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_parts:Needy", "my_parts:Needy cannot be constructed; got "),
        (
            "my_parts:Uncounted",
            "tokens_out of the visual tokens my_parts:Uncounted fails",
        ),
    ],
)
def test_visual_tokens_that_fail_are_named(world: Folders, here: Path, name: str, words: str) -> None:
    features, out = world.llm.parent / "features", here / "failing"
    command = ("train", "run", "--features", features, "--llm", world.llm, "--out", out, "--device", "cpu")
    assert words in call(*command, "--visual-tokens", name, code=1).one_line()
    assert not list(out.glob("*"))


@pytest.mark.usefixtures("_in_its_folder")
def test_a_sweep_over_ones_own_and_built_in_projectors_together(world: Folders, here: Path) -> None:
    features = world.llm.parent / "features"
    swept = call(
        *("train", "sweep", "--features", features, "--eval-features", features, "--llm", world.llm),
        *("--space", "projector=linear,my_parts:Gated", "--together", 2, "--out", here / "sweep"),
        *("--max-steps", 2, "--batch-size", 2, "--device", "cpu", "--json"),
    ).summary
    assert swept["finished"] == 2


@pytest.mark.usefixtures("_in_its_folder")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "unknown projector 'nothing'; known: cabstractor, ldp, linear"),
        ("lineer", "unknown projector 'lineer'; did you mean 'linear'?"),
        ("my_parts:Nothing", "the projector my_parts:Nothing cannot be loaded"),
        ("my_parts:factory", "expected a class with forward and state_dict; got function"),
        ("os:system", "expected a class with forward and state_dict; got builtin_function_or_method"),
        ("my_parts:Doubled", "the projector my_parts:Doubled gives another shape; expected (2, "),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    world: Folders, here: Path, name: str, words: str
) -> None:
    features, out = world.llm.parent / "features", here / "refused"
    command = ("train", "run", "--features", features, "--llm", world.llm, "--out", out, "--device", "cpu")
    ended = call(*command, "--projector", name, code=1 if name == "my_parts:Doubled" else 2)
    assert words in ended.one_line()
    assert not list(out.glob("*"))


@pytest.mark.usefixtures("_in_its_folder")
def test_a_registered_name_records_its_class_and_arguments() -> None:
    with pytest.raises(LlavaError, match="unknown projector 'deep'"):
        PROJECTORS.get("deep")
    PROJECTORS.get("my_parts:Gated")  # imports the module, which registers it
    projector = build_projector("deep", 4, 6)
    sizes = {"in_width": 4, "out_width": 6}
    assert projector.config == {"kind": "my_parts:Gated", **sizes, "visual_tokens": "all", "depth": 2}
    again = build_projector(**projector.config)
    assert parameter_count(again) == parameter_count(projector) == 2 * (4 * 4 + 4) + 4 * 6 + 6
    with pytest.raises(LlavaError, match="the projector 'linear' exists"):
        PROJECTORS.register("linear")(type(again.map))

    class Local(torch.nn.Linear):
        pass

    with pytest.raises(LlavaError, match="cannot be loaded by another process"):
        PROJECTORS.register("local")(Local)


def test_an_installed_package_adds_names(here: Path, world: Folders, tmp_path: Path) -> None:
    """By entry points, as pip writes them."""
    site = tmp_path / "site"
    install(
        site,
        "[llava_align.projectors]\ndeep = my_parts:Gated\n"
        "[llava_align.vision_encoders]\nbroken = my_encoder:Gone\nodd = my_encoder:Odd\n"
        "flat = my_encoder:Flat\n",
    )
    (site / "my_parts.py").write_text(MINE, encoding="utf-8")
    (site / "my_encoder.py").write_text(ENCODER, encoding="utf-8")
    path = f"{site}:{ROOT}"
    features = world.llm.parent / "features"
    out = tmp_path / "run"
    train = (
        *("train", "run", "--features", features, "--llm", world.llm, "--out", out, "--max-steps", 1),
        *("--batch-size", 2, "--device", "cpu", "--projector", "deep"),
    )
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/flat.json").write_text('{"side": 8}')
    (tmp_path / "images").mkdir()
    shutil.copy(world.images[0], tmp_path / "images/a.png")
    images = ("--data", tmp_path / "images", "--vision", tmp_path / "flat", "--out", tmp_path / "shards")
    extract = ("extract", "run", *images, "--device", "cpu", "--max-failed", 1, "--json")
    _, extracted = run_each([train, extract], PYTHONPATH=path)
    recorded = json.loads((out / "last/config.json").read_text())["projector"]
    assert (recorded["kind"], recorded["depth"]) == ("my_parts:Gated", 2)
    assert extracted.summary["rows"] == 1
    left_out = [line for line in extracted.err.splitlines() if line.startswith("left out: ")]
    assert [line.split("'")[1] for line in left_out] == ["broken", "odd"]
    assert "'broken' of the package my-parts cannot be loaded; got module 'my_encoder' has no" in left_out[0]
    assert f"'odd' fails to recognise {tmp_path / 'flat'}; got division by zero" in left_out[1]


ENCODER = '''
import json
import torch
from llava_core.vision.preprocess import Preprocess
from llava_core.vision.tower import VisionTower

class Odd:
    @staticmethod
    def recognises(folder):
        return 1 / 0
    open = recognises

class Flat:
    """Four tokens: the quarters of the image, as they are."""
    @staticmethod
    def recognises(folder):
        return (folder / "flat.json").exists()

    @staticmethod
    def open(folder, device, dtype, layer, decode):
        side = json.loads((folder / "flat.json").read_text())["side"]
        def tokens(pixels):
            quarters = pixels.unfold(2, side // 2, side // 2).unfold(3, side // 2, side // 2)
            return quarters.flatten(2, 3).transpose(1, 2).flatten(2)
        record = {"model_id": "flat", "weights_sha256": "", "layer": layer, "tokens": 4,
                  "width": 3 * (side // 2) ** 2, "dtype": "float32"}
        return VisionTower(Preprocess(side, (0.5,) * 3, (0.5,) * 3, decode=decode), record, device, dtype,
                           tokens, torch.nn.Identity())
'''


def test_a_projector_whose_scale_no_linear_layer_sets_needs_another_start() -> None:
    normed = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    with pytest.raises(LlavaError, match="does not set the scale"):
        match_scale(normed, torch.randn(5, 3), 0.1)
    with pytest.raises(LlavaError, match=r"no nn\.Linear to start from; use --start torch"):
        match_scale(torch.nn.Identity(), torch.randn(5, 3), 0.1)
