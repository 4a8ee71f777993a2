"""The projector in a file that another project wrote: its weights found by names and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava_core.errors import LlavaError

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Project:
    """Who trained it, and what its projector was given."""

    name: str
    marks: tuple[str, ...]
    """Parts of its weights' names that no other has."""
    visual_tokens: str
    layer: int | None
    why: str


PROJECTS = (
    Project(
        "LLaVA",
        ("mm_projector", "multi_modal_projector"),
        "patches",
        -2,
        "LLaVA projects the patches of the second-to-last hidden states, without CLS",
    ),
    Project(
        "nanoVLM",
        ("MP",),
        "shuffle",
        None,
        "nanoVLM projects 2x2 patches side by side, after the last layer norm",
    ),
    Project("course", (), "all", None, "the course projects all tokens, CLS too, after the last layer norm"),
)
"""The last one is whatever bears no mark."""


NAMES = ("projector", "projection", "proj", "connector")
"""Other parts of names under which a file of a whole model has its projector."""


LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "linear": {"": ("",)},
    "mlp": {"0": ("0", "linear_1", "fc1"), "2": ("2", "linear_2", "fc2")},
    "mlp3": {name: (name,) for name in "024"},
}
"""Kind of projector -> its layers by our names, each with theirs, less `.weight` and `.bias`."""


HALVES = {
    name: other for pair in zip(*LAYOUTS["mlp"].values(), strict=True) for name, other in (pair, pair[::-1])
}
"""A layer of an mlp -> the one without which it is half a projector."""


NO_PREFIX = (*HALVES, "lm_head", "embed_tokens")
"""Names of a lone layer that make it no linear projector."""


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a .pt, .bin or .safetensors file by its name, out of the dicts around them.

    Nothing in the file is run: `weights_only`. Raises LlavaError if it cannot be read so.
    """
    if not path.is_file():
        raise LlavaError(f"no file {path}", do="give --file the projector's weights")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each of the libraries raises kinds of its own for a damaged file
        module = "Unsupported global" in str(error)
        raise LlavaError(
            f"cannot read {path}",
            expected="a state dict saved with torch.save, or safetensors",
            got="a pickled module" if module else "a torn file, or one of another kind",
            do="save projector.state_dict(), not the module" if module else "copy or download it again",
        ) from None
    for _ in WRAPPERS:  # no deeper: one may be in itself
        held = loaded if isinstance(loaded, Mapping) else {}
        loaded = next((held[key] for key in WRAPPERS if isinstance(held.get(key), Mapping)), loaded)
    tensors = {
        str(name): value
        for name, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise LlavaError(f"{path} holds no weights", expected="a state dict", got=type(loaded).__name__)
    for name, value in tensors.items():
        if value.is_quantized or value.layout != torch.strided or value.is_meta:
            raise LlavaError(f"{path}: {name}", expected="numbers, neither quantized nor sparse")
    return tensors


def require_numbers(path: Path, weights: Tensors) -> None:
    """Raise LlavaError if a weight is not finite, as after a run that diverged."""
    floating = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if bad := [name for name, weight in floating.items() if not weight.float().isfinite().all()]:
        raise LlavaError(f"{path} is of no use", expected="finite weights", got=f"nan or inf in {bad[0]}")


def project_of(tensors: Tensors) -> Project:
    parts = {part for name in tensors for part in name.split(".")}
    return next(project for project in PROJECTS if not project.marks or parts & set(project.marks))


def beside(tensors: Tensors) -> Tensors:
    """What by its names is no part of the projector; nothing if no name says which part is."""
    marks = {mark for project in PROJECTS for mark in project.marks} | set(NAMES)
    rest = {name: value for name, value in tensors.items() if not marks & set(name.split("."))}
    return rest if len(rest) < len(tensors) else {}


def find_projector(tensors: Tensors) -> tuple[str, Tensors]:
    """The kind of projector, and its weights by our names, fp32; a bias that it lacks is zero.

    Raises LlavaError unless the names, less what they begin with alike, are all those of one layout.
    """
    rest = beside(tensors)
    its = {name: value for name, value in tensors.items() if name not in rest}
    short = _without_prefix(its)
    for kind, layers in LAYOUTS.items():
        found: Tensors = {}
        for ours, theirs in layers.items():
            for name in theirs:
                weight = short.get(_join(name, "weight"))
                if weight is not None and weight.ndim == 2 and weight.is_floating_point():
                    bias = short.get(_join(name, "bias"))
                    found[_join(ours, "weight")] = weight.float()
                    found[_join(ours, "bias")] = torch.zeros(len(weight)) if bias is None else bias.float()
        used = {
            _join(name, leaf) for names in layers.values() for name in names for leaf in ("weight", "bias")
        }
        biases = len(short) - len(layers)
        if len(found) == 2 * len(layers) and short.keys() <= used and biases in (0, len(layers)):
            return kind, found
    alone = {name.rpartition(".")[0] for name in short}
    if len(alone) == 1 and (missing := HALVES.get(half := alone.pop())):
        raise LlavaError(
            f"only layer {half} of an mlp is in the file",
            expected=f"{missing} beside it",
            do="save both in one file, perhaps from two shards; if it is a linear one, as weight and bias",
        )
    got = ", ".join(
        f"{name} {str(value.dtype)[6:]}{list(value.shape)}" for name, value in list(its.items())[:6]
    )
    raise LlavaError(
        "no projector known here",
        expected="weight and bias, or linear_1 and linear_2, or 0 and 2 (and 4) with GELU between them",
        got=got + (", …" if len(its) > 6 else ""),
    )


def ends(weights: Tensors) -> tuple[str, str]:
    """Names of the weight that takes features and of the one that gives embeddings."""
    names = [name for name in weights if name.endswith("weight")]
    return names[0], names[-1]


def _without_prefix(tensors: Tensors) -> Tensors:
    """By names without the parts that all begin with; the last part stays, and a lone layer's NO_PREFIX."""
    names = [name.split(".") for name in tensors]
    shared = 0
    while all(len(name) > shared + 1 and name[shared] == names[0][shared] for name in names):
        shared += 1
    if len(names[0]) == shared + 1 > 1 and names[0][shared - 1] in NO_PREFIX:
        shared -= 1
    return {".".join(name[shared:]): value for name, value in zip(names, tensors.values(), strict=True)}


def _join(layer: str, leaf: str) -> str:
    return f"{layer}.{leaf}" if layer else leaf


WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "projector", "projector_state_dict")
"""Keys under which files keep the weights."""
