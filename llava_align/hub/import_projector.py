"""`llava import`: a projector that another project trained, as a checkpoint folder.

Its kind is told by the names and shapes of its weights, its habits (which tokens, of which layer) by what its
project is known for; both are printed, and flags say otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llava_align.config import ImportConfig
from llava_align.hub.frozen_weights import require_frozen_weights
from llava_core.cli.console import say, show, table
from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.input_folders import config_of, weight_files
from llava_core.language.load import outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import Projector, build_projector, parameter_count
from llava_core.registry import VISUAL_TOKENS
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower

Tensors = dict[str, torch.Tensor]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "projector", "projector_state_dict")
"""Keys under which files keep the weights."""


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
}
"""Kind of projector -> its layers by our names, each with theirs, less `.weight` and `.bias`."""

HALVES = {
    name: other for pair in zip(*LAYOUTS["mlp"].values(), strict=True) for name, other in (pair, pair[::-1])
}
"""A layer of an mlp -> the one without which it is half a projector."""

NO_PREFIX = (*HALVES, "lm_head", "embed_tokens")
"""Names of a lone layer that make it no linear projector."""


def run(config: ImportConfig) -> JsonDict:
    """Write the checkpoint; returns what was found and assumed.

    Raises LlavaError for a file of our own, without a projector known here, that fits neither model, or that
    holds other weights than these beside its projector.
    """
    if config.out.exists():
        raise LlavaError(f"--out {config.out} is there already", do="choose another, or delete it")
    tensors = read_tensors(config.file)
    require_others(config.file)
    project = project_of(tensors)
    kind, weights = find_projector(tensors)
    require_numbers(config.file, weights)
    layer = project.layer if config.layer == "auto" else None if config.layer == "norm" else config.layer
    visual_tokens = project.visual_tokens if config.visual_tokens == "auto" else config.visual_tokens
    tower = open_vision_tower(config.vision, layer=layer, decode=config.decode)
    outline = outline_language_model(config.llm)
    projector = fitted(kind, weights, tower, outline, visual_tokens)
    language = require_frozen_weights(config.file, beside(tensors), tower, outline, config.llm)
    if language is None:
        sha256 = sha256_files(weight_files(config.llm))
        language = dataclasses.replace(outline.identity, weights_sha256=sha256)
    tokens = projector.tokens_out(tower.tokens)

    source = {
        "file": config.file.name,
        "sha256": sha256_files([config.file]),
        "project": project.name,
        "layer": layer,
        "visual_tokens": visual_tokens,
    }
    provenance = Provenance(tower.identity, language)
    metrics = {"imported_from": source["file"], "imported_sha256": source["sha256"]}
    save_checkpoint(config.out, projector, provenance, {"imported": source}, metrics, state=None)

    assumed = f"assumed, since {project.why}"
    rows = [
        ("projector", f"{kind}, {parameter_count(projector):,} weights", "by names and shapes"),
        ("trained by", project.name, "by names" if project.marks else "assumed: no other project's names"),
        ("layer", "after the last norm" if layer is None else f"hidden states {layer}",
         assumed if config.layer == "auto" else "as told"),
        ("visual tokens", f"{visual_tokens} ({tower.tokens}→{tokens})",
         assumed if config.visual_tokens == "auto" else "as told"),
        ("conversation", provenance.conversation, "assumed: picture first, then the chat template"),
    ]  # fmt: skip
    if kind == "mlp":
        rows.insert(1, ("between its layers", "exact GELU, not tanh's", "assumed: the weights do not say"))
    for name, value, why in rows:
        say(f"{name}: {value} ({why})")
    say(f"{tower.encoder['model_id']} → {config.out} → {language.id}")
    show(table([("checkpoint", config.out), ("fingerprint", tower.identity.fingerprint[:12])]))
    return {
        **source,
        "kind": kind,
        "out": str(config.out),
        "tokens": tokens,
        "fingerprint": tower.identity.fingerprint,
    }


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
    while isinstance(loaded, Mapping):
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        loaded = inner[0]
    tensors = {
        str(name): value
        for name, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise LlavaError(f"{path} holds no weights", expected="a state dict", got=type(loaded).__name__)
    return tensors


def require_others(path: Path) -> None:
    """Raise LlavaError for weights of our own: the config.json beside them knows what names do not say."""
    config = config_of(path.parent)
    if config.get("format") == "llava-projector":
        raise LlavaError(f"{path} is of a checkpoint already", do=f"give --checkpoint {path.parent}")
    if config.get("model_type") == "llava_align":
        do = "give --checkpoint the one that it was made from"
        raise LlavaError(f"{path} is of a whole model that `llava export` made", do=do)


def require_numbers(path: Path, weights: Tensors) -> None:
    """Raise LlavaError if a weight is not finite, as after a run that diverged."""
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
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
        expected="weight and bias, or linear_1 and linear_2, or 0 and 2 with GELU between them",
        got=got + (", …" if len(its) > 6 else ""),
    )


def fitted(
    kind: str, weights: Tensors, tower: VisionTower, llm: LanguageModel, visual_tokens: str
) -> Projector:
    """The projector with these weights. Raises LlavaError unless its widths are those of the two models."""
    first, last = (weights[name] for name in _ends(weights))
    in_width, out_width = first.shape[1], last.shape[0]
    projector = build_projector(kind, tower.width, llm.hidden, visual_tokens)
    wanted = tower.width * projector.select.widening
    if in_width != wanted:
        fits = [
            n
            for n in VISUAL_TOKENS.builtins
            if tower.width * VISUAL_TOKENS.get(n).target.widening == in_width
        ]
        raise LlavaError(
            f"the projector does not fit {tower.encoder['model_id']} with --visual-tokens {visual_tokens}",
            expected=f"{wanted} wide",
            got=f"{in_width}",
            do=f"give --visual-tokens {' or '.join(fits)}" if fits else "give the encoder it was trained on",
        )
    if out_width != llm.hidden:
        raise LlavaError(
            f"the projector does not fit {llm.id}",
            expected=f"{llm.hidden} wide",
            got=f"{out_width}",
            do="give the language model it was trained for",
        )
    for name, own in projector.map.state_dict().items():
        if weights[name].shape != own.shape:
            raise LlavaError(
                f"{kind} of another shape",
                expected=f"{name} {list(own.shape)}",
                got=list(weights[name].shape),
            )
    projector.map.load_state_dict(weights)
    return projector


def _ends(weights: Tensors) -> tuple[str, str]:
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
