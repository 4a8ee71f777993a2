from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from llava_align.hub.foreign_projector import find_projector, project_of, read_tensors, require_numbers
from llava_core.errors import LlavaError
from llava_core.projector.projector import build_projector

IN, OUT = 6, 8


def layer(prefix: str, in_width: int = IN, bias: bool = True) -> dict[str, torch.Tensor]:
    made = {f"{prefix}weight": torch.randn(OUT, in_width), f"{prefix}bias": torch.randn(OUT)}
    return made if bias else {f"{prefix}weight": made[f"{prefix}weight"]}


def two(first: str, second: str) -> dict[str, torch.Tensor]:
    return {**layer(first), **layer(second, OUT)}


OTHERS = {"model.embed_tokens.weight": torch.zeros(3, OUT), "model.layers.0.bias": torch.zeros(2)}
FILES: list[tuple[Any, str, str]] = [
    (layer(""), "linear", "course"),
    (layer("projection."), "linear", "course"),
    (layer("module.projector."), "linear", "course"),
    ({"epoch": 3, "state_dict": layer("module.")}, "linear", "course"),
    ({"projector": layer("linear.")}, "linear", "course"),
    (two("module.0.linear_1.", "module.0.linear_2."), "mlp", "course"),
    (two("linear_1.", "linear_2."), "mlp", "course"),
    ({"model": {"projector": two("projector.0.", "projector.2."), "llm": OTHERS}}, "mlp", "course"),
    (layer("model.mm_projector."), "linear", "LLaVA"),
    (two("model.mm_projector.0.", "model.mm_projector.2."), "mlp", "LLaVA"),
    ({**OTHERS, **two("base_model.model.model.mm_projector.0.", "base_model.model.model.mm_projector.2.")},
     "mlp", "LLaVA"),
    (two("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."), "mlp", "LLaVA"),
    ({**OTHERS, **layer("MP.proj.", bias=False)}, "linear", "nanoVLM"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "kind", "project"), FILES)
def test_a_projector_is_known_by_names_and_shapes(
    tmp_path: Path, content: Any, kind: str, project: str
) -> None:
    torch.save(content, tmp_path / "p.pt")
    tensors = read_tensors(tmp_path / "p.pt")
    assert project_of(tensors).name == project
    found, weights = find_projector(tensors)
    assert found == kind
    projector = build_projector(kind, IN, OUT)
    projector.map.load_state_dict(weights)
    its = [value for name, value in tensors.items() if name not in OTHERS]
    x = torch.randn(3, IN)
    bias = its[1] if len(its) > 1 else None
    expected = F.linear(x, its[0], bias)
    if kind == "mlp":  # nn.GELU() is the exact one, as LLaVA's
        expected = F.linear(nn.GELU()(expected), its[2], its[3])
    torch.testing.assert_close(projector(x), expected)


def test_safetensors_and_half_precision(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in layer("mm_projector.").items()}
    save_file(half, tmp_path / "p.safetensors")
    _, weights = find_projector(read_tensors(tmp_path / "p.safetensors"))
    assert weights["weight"].dtype == torch.float32
    assert torch.equal(weights["weight"].half(), half["mm_projector.weight"])


@pytest.mark.parametrize(
    "content",
    [
        {**two("0.", "2."), **layer("4.", OUT), **layer("6.", OUT)},
        {**layer("a."), **layer("b.")},
        {"lm_head.weight": torch.zeros(OUT, IN)},
        {"language_model.model.embed_tokens.weight": torch.zeros(OUT, IN)},
        {**layer("0."), **layer("2.", OUT, bias=False)},  # whose other bias is in another shard
        {"weight": torch.zeros(3)},
        {**layer(""), "running_mean": torch.zeros(2)},
        {name: value.to(torch.complex64) for name, value in layer("").items()},
        {name: value.to(torch.int8) for name, value in layer("").items()},
    ],
)
def test_what_is_no_projector_of_ours_is_said_with_its_names(content: Any) -> None:
    with pytest.raises(LlavaError, match=r"expected weight and bias.*got .*\[") as caught:
        find_projector(content)
    assert next(iter(content)) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "half", "missing"),
    [
        ({**layer("model.mm_projector.0."), "model.norm.weight": torch.ones(OUT)}, "0", "2"),
        (layer("linear_1."), "linear_1", "linear_2"),
        (layer("multi_modal_projector.linear_2.", OUT), "linear_2", "linear_1"),
        ({"model": {"projector": layer("linear_1.", bias=False)}}, "linear_1", "linear_2"),
        (layer("projector.0."), "0", "2"),  # perhaps a linear one in an nn.Sequential: it does not say
    ],
)
def test_half_an_mlp_is_no_linear_projector(tmp_path: Path, content: Any, half: str, missing: str) -> None:
    torch.save(content, tmp_path / "p.pt")
    with pytest.raises(LlavaError, match=f"only layer {half} of an mlp is in .*; expected {missing} beside"):
        find_projector(read_tensors(tmp_path / "p.pt"))


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlavaError, match="no file"):
        read_tensors(tmp_path / "nowhere.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # a pickle that would run code
    with pytest.raises(LlavaError, match=r"save projector.state_dict\(\), not the module"):
        read_tensors(tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(LlavaError, match="holds no weights"):
        read_tensors(tmp_path / "empty.pt")
    torch.save({"weight": torch.zeros(3000, 3)}, tmp_path / "whole.pt")
    torn = (tmp_path / "whole.pt").read_bytes()[:9000]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    for name, content in (("torn.pt", torn), ("pointer.bin", pointer), ("cut.safetensors", b"\x00" * 20)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LlavaError, match="got a torn file, or one of another kind; copy or download it"):
            read_tensors(tmp_path / name)


def test_weights_of_a_run_that_diverged(tmp_path: Path) -> None:
    weights = layer("")
    require_numbers(tmp_path / "p.pt", weights)
    weights["bias"][3] = torch.nan
    with pytest.raises(LlavaError, match="expected finite weights; got nan or inf in bias"):
        require_numbers(tmp_path / "p.pt", weights)


def test_a_module_saved_whole_is_named_in_one_plain_line(tmp_path: Path) -> None:
    torch.save(nn.Linear(IN, OUT), tmp_path / "p.pt")
    with pytest.raises(LlavaError, match=r"got a pickled module; save projector\.state_dict\(\)"):
        read_tensors(tmp_path / "p.pt")
