"""`llava import`: what another project (LLaVA, nanoVLM, the course) trained, as a checkpoint folder.

Its kind follows from the names and shapes of its weights; which tokens of which layer it takes is assumed
from the project. Both are printed, and flags override them. A file of stage 2 has the whole language model,
too; LLaVA's folder of LoRA has an adapter.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from llava_align.hub.config import ImportConfig
from llava_align.hub.foreign_projector import (
    Tensors,
    beside,
    ends,
    find_projector,
    project_of,
    read_tensors,
    require_numbers,
)
from llava_align.hub.frozen_weights import trained_weights
from llava_core.cli.console import say, show, table
from llava_core.errors import LlavaError
from llava_core.filesystem import sha256_files
from llava_core.input_folders import config_of, contents, weight_files
from llava_core.language.load import load_language_model, outline_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.tuned_weights import LoraAdapter, TunedWeights
from llava_core.projector.checkpoint import Provenance, save_checkpoint
from llava_core.projector.projector import Projector, build_projector, parameter_count, require_tokens
from llava_core.types import JsonDict
from llava_core.vision.open import open_vision_tower
from llava_core.vision.tower import VisionTower

LLAVA_LORA = "non_lora_trainables.bin"
"""Where LLaVA keeps the projector beside its LoRA adapter."""
TRAINED = {None: "frozen, as given", "lora": "LoRA adapters, in adapter/", "llm": "trained whole, in llm/"}
"""What is imported of the language model, by the value of --tune."""


def run(config: ImportConfig) -> JsonDict:
    """Write the checkpoint; returns what was found and assumed.

    Raises LlavaError if the file is a checkpoint of this project, has no known projector, does not fit the
    models, or holds other weights than theirs beside the projector.
    """
    file = projector_file(config.file)
    tensors = read_tensors(file)
    require_others(file)
    project = project_of(tensors)
    kind, weights = find_projector(tensors)
    require_numbers(file, tensors)
    layer = project.layer if config.layer == "auto" else None if config.layer == "norm" else config.layer
    visual_tokens = project.visual_tokens if config.visual_tokens == "auto" else config.visual_tokens
    tower = open_vision_tower(config.vision, layer=layer, decode=config.decode, fit=config.fit)
    outline = outline_language_model(config.llm)
    projector = fitted(kind, weights, tower, outline, visual_tokens)
    tuned: TunedWeights | None = trained_weights(file, beside(tensors), tower, outline, config.llm)
    if config.file.is_dir():
        tuned = LoraAdapter.read(load_language_model(config.llm), config.file)
    sha256 = sha256_files(weight_files(config.llm))
    language = dataclasses.replace(outline.identity, weights_sha256=sha256)
    tokens = projector.tokens_out(tower.tokens)

    source = {
        "file": config.file.name,
        "sha256": sha256_files([file]),
        "project": project.name,
        "layer": layer,
        "visual_tokens": visual_tokens,
    }
    provenance = Provenance(tower.identity, language)
    metrics = {"imported_from": source["file"], "imported_sha256": source["sha256"]}
    save_checkpoint(config.out, projector, provenance, {"imported": source}, metrics, None, tuned)

    assumed = f"assumed, since {project.why}"
    rows = [
        ("projector", f"{kind}, {parameter_count(projector):,} weights", "by names and shapes"),
        ("language model", TRAINED[tuned.kind if tuned else None], "by its weights"),
        ("trained by", project.name, "by names" if project.marks else "assumed: no other project's names"),
        ("layer", "after the last norm" if layer is None else f"hidden states {layer}",
         assumed if config.layer == "auto" else "as told"),
        ("visual tokens", f"{visual_tokens} ({tower.tokens}→{tokens})",
         assumed if config.visual_tokens == "auto" else "as told"),
        ("conversation", provenance.conversation, "assumed: picture first, then the chat template"),
    ]  # fmt: skip
    if kind.startswith("mlp"):
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


def projector_file(path: Path) -> Path:
    """The file itself, or, of LLaVA's LoRA folders, the one beside the adapter. Raises LlavaError."""
    if not path.is_dir():
        return path
    if not (path / LLAVA_LORA).is_file() or not (path / "adapter_config.json").is_file():
        raise LlavaError(
            f"--file {path}",
            expected=f"a file, or a folder with adapter_config.json and {LLAVA_LORA}",
            got=contents(path),
        )
    return path / LLAVA_LORA


def require_others(path: Path) -> None:
    """Raise LlavaError for this project's own files, whose config.json has what an import would guess."""
    config = config_of(path.parent)
    if config.get("format") == "llava-projector":
        raise LlavaError(f"{path} is of a checkpoint already", do=f"give --checkpoint {path.parent}")
    if config.get("model_type") == "llava_align":
        do = "give --checkpoint the one that it was made from"
        raise LlavaError(f"{path} is of a whole model that `llava export` made", do=do)


def fitted(
    kind: str, weights: Tensors, tower: VisionTower, llm: LanguageModel, visual_tokens: str
) -> Projector:
    """The projector with these weights. Raises LlavaError unless its widths are those of the two models."""
    first, last = (weights[name] for name in ends(weights))
    in_width, out_width = first.shape[1], last.shape[0]
    require_tokens(kind, visual_tokens, tower.tokens)  # or refuse, before weights take memory
    projector = build_projector(kind, tower.width, llm.hidden, visual_tokens)
    wanted = tower.width * projector.select.widening
    if in_width != wanted:
        factor = math.isqrt(in_width // tower.width)
        fits = ["all", "patches", "pool"] if factor == 1 else [f"shuffle{factor}"]
        fits = fits if factor and in_width == tower.width * factor**2 else []
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
