"""Names and classes of one's own: what is registered, recorded, constructed, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llava_core.cli.console import say_once
from llava_core.errors import LlavaError
from llava_core.input_folders import registered_layout
from llava_core.projector.projector import build_projector
from llava_core.registry import PROJECTORS, VISION_ENCODERS, VISUAL_TOKENS, Registry
from llava_core.vision.open import open_vision_tower
from tests.support.entry_points import install

MODULE = """
import torch
from llava_align import register_projector, register_vision_encoder, register_visual_tokens

@register_projector("scaled", by=3)
class Scaled(torch.nn.Linear):
    def __init__(self, in_width, out_width, by=1):
        super().__init__(in_width, out_width * by)

@register_visual_tokens("every4", step=4)
class Every:
    widening = 1
    def __init__(self, step):
        self.step = step
    def __call__(self, features):
        return features[..., :: self.step, :]
    def tokens_out(self, tokens):
        return len(range(0, tokens, self.step))

@register_projector("first")
class Twice(torch.nn.Linear):
    pass

@register_projector("second")
class Twice(torch.nn.Linear):
    pass

class Tied(torch.nn.Module):
    def __init__(self, in_width, out_width):
        super().__init__()
        self.map = self.again = torch.nn.Linear(in_width, out_width)
    def forward(self, features):
        return self.again(features)

class Weightless(torch.nn.Module):
    def __init__(self, in_width, out_width):
        super().__init__()
    def forward(self, features):
        return features

class Halves:
    widening = 1
    def tokens_out(self, tokens):
        return tokens // 0

class Unsure:
    @staticmethod
    def recognises(folder):
        return {}["layout"]
    open = recognises

class Broken:
    @staticmethod
    def recognises(folder):
        return folder.name == "mine"
    @staticmethod
    def open(*arguments):
        raise KeyError("side")
"""


class Plain(nn.Linear):
    """Registered by the tests, at the top of a module."""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs `my_parts.py` with these entry points; all that is registered is forgotten afterwards."""
    (tmp_path / "my_parts.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda points: install(tmp_path, points)
    sys.modules.pop("my_parts", None)
    say_once.cache_clear()
    for registry in (PROJECTORS, VISUAL_TOKENS, VISION_ENCODERS):
        registry.registered.clear()


def test_an_installed_name_keeps_the_arguments_of_its_decorator(parts: Callable[[str], None]) -> None:
    parts("[llava_align.projectors]\nscaled = my_parts:Scaled\nplain = my_parts:Scaled\n")
    assert PROJECTORS.get("scaled").arguments == {"by": 3}
    assert PROJECTORS.get("plain").arguments == {}
    assert PROJECTORS.get("my_parts:Scaled").arguments == {}


def test_a_name_that_two_packages_have_is_refused(parts: Callable[[str], None], tmp_path: Path) -> None:
    parts("[llava_align.projectors]\nscaled = my_parts:Scaled\n")
    install(tmp_path, "[llava_align.projectors]\nscaled = others:Scaled\n", name="others")
    with pytest.raises(LlavaError, match=r"several installed packages have .* 'scaled'; got .*others"):
        PROJECTORS.get("scaled")


def test_what_is_missing_is_said_of_the_package_that_lacks_it(
    parts: Callable[[str], None], tmp_path: Path
) -> None:
    (tmp_path / "my_parts.py").write_text("import no_such_module", encoding="utf-8")
    parts("[llava_align.projectors]\nscaled = my_parts:Scaled\n")
    with pytest.raises(LlavaError) as failed:
        PROJECTORS.get("scaled")
    assert str(failed.value) == (
        "the projector 'scaled' of the package my-parts cannot be loaded; got no module named "
        "'no_such_module'; install the package that has it, or run where no_such_module.py lies"
    )


@pytest.mark.usefixtures("parts")
def test_arguments_of_visual_tokens_are_recorded_and_restored() -> None:
    VISUAL_TOKENS.get("my_parts:Every")  # imports the module, which registers it
    projector = build_projector("scaled", 4, 6, "every4")
    assert projector.config == {
        "kind": "my_parts:Scaled",
        "in_width": 4,
        "out_width": 6,
        "visual_tokens": "my_parts:Every",
        "visual_tokens_arguments": {"step": 4},
        "by": 3,
    }
    again = build_projector(**projector.config)
    assert again.config == projector.config
    assert projector.tokens_out(8) == again.tokens_out(8) == 2
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(torch.ones(1, 8, 4)), projector(torch.ones(1, 8, 4)))


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("registry", "arguments", "words"),
    [
        (
            PROJECTORS,
            {"act": nn.ReLU},
            "cannot record the argument act of the projector 'x'; expected a number",
        ),
        (PROJECTORS, {"sizes": (1, 2)}, r"argument sizes .* got \(1, 2\)"),
        (PROJECTORS, {"by": {1: 2}}, r"argument by .* got \{1: 2\}"),
        (PROJECTORS, {"by": float("nan")}, "argument by .* got nan"),
        (VISUAL_TOKENS, {"steps": {2}}, "argument steps of the visual tokens 'x'"),
        (PROJECTORS, {"kind": "x"}, "cannot be registered with an argument kind; give it another name"),
        (PROJECTORS, {"in_width": 4}, "an argument in_width"),
        (PROJECTORS, {"out_width": 4}, "an argument out_width"),
        (PROJECTORS, {"visual_tokens": "all"}, "an argument visual_tokens"),
        (PROJECTORS, {"visual_tokens_arguments": {}}, "an argument visual_tokens_arguments"),
        (VISION_ENCODERS, {"side": 8}, "vision encoder 'x' cannot .* an argument side; leave it out"),
    ],
)
def test_arguments_that_a_checkpoint_cannot_record_are_refused_at_registration(
    registry: Registry, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(LlavaError, match=words):
        registry.register("x", **arguments)
    assert not registry.registered


@pytest.mark.usefixtures("parts")
def test_arguments_may_have_any_name_that_a_checkpoint_leaves_free() -> None:
    PROJECTORS.register("x", name="y", sizes=[1, {"a": None}], bias=True)(Plain)
    VISUAL_TOKENS.register("x", kind="y")
    assert PROJECTORS.get("x").arguments == {"name": "y", "sizes": [1, {"a": None}], "bias": True}


@pytest.mark.usefixtures("parts")
def test_a_class_that_fails_is_named() -> None:
    with pytest.raises(LlavaError, match=r"my_parts:Every cannot be constructed; got .*missing 1 required"):
        build_projector("linear", 4, 4, "my_parts:Every")
    with pytest.raises(LlavaError, match=r"tokens_out of the visual tokens my_parts:Halves .* fails for 9"):
        build_projector("linear", 4, 4, "my_parts:Halves").require_shapes(9)


@pytest.mark.usefixtures("parts")
def test_projectors_that_a_checkpoint_could_not_give_back_are_refused() -> None:
    import my_parts  # type: ignore[import-not-found]

    assert my_parts.Twice is PROJECTORS.get("second").target
    with pytest.raises(LlavaError, match="'first' would load as another class of the name my_parts:Twice"):
        PROJECTORS.get("first")
    with pytest.raises(LlavaError, match=r"my_parts:Tied has map\.weight and again\.weight in one place"):
        build_projector("my_parts:Tied", 4, 4).require_shapes(9)
    with pytest.raises(LlavaError, match="my_parts:Weightless has no weight to train"):
        build_projector("my_parts:Weightless", 4, 4).require_shapes(9)


def test_encoders_that_fail_are_left_out_and_named(
    parts: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts(
        "[llava_align.vision_encoders]\ngone = no_such_module:Gone\nunsure = my_parts:Unsure\n"
        "broken = my_parts:Broken\n"
    )
    (tmp_path / "mine").mkdir()
    for _ in range(2):  # said once
        layout = registered_layout(tmp_path / "mine")
        assert layout is not None
        assert layout.__name__ == "Broken"
    gone, unsure = capsys.readouterr().err.splitlines()
    assert gone.startswith(
        "left out: the vision encoder 'gone' of the package my-parts cannot be loaded; got no"
    )
    assert unsure.startswith(
        f"left out: the vision encoder 'unsure' fails to recognise {tmp_path / 'mine'}; got"
    )
    with pytest.raises(LlavaError, match=r"the vision encoder Broken cannot open .*mine; got 'side'"):
        open_vision_tower(tmp_path / "mine")
