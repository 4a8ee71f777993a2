"""Weights of encoder and language model in a projector's file, at import: as given, or trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.model import LanguageModel
from llava_core.language.tuned_weights import AllWeights
from llava_core.vision.tower import VisionTower

COMPUTED = ("inv_freq", "position_ids", "masked_bias")
"""Last name parts of buffers that older versions of transformers saved, and that training never changes."""


def trained_weights(
    path: Path, beside: Mapping[str, torch.Tensor], tower: VisionTower, outline: LanguageModel, llm: Path
) -> AllWeights | None:
    """What the weights `beside` a projector in the file `path` have of the language model; None if frozen.

    `outline` is of the language model in the folder `llm`, which is loaded if the file has weights by its
    names. If one differs and all are there, stage 2 has trained them. Raises LlavaError if only some are
    there and one differs, if one of the encoder differs, or if one belongs to neither model.
    """
    rest = {name: value for name, value in beside.items() if name.rpartition(".")[2] not in COMPUTED}
    of_language = _by_name(rest, outline.model.state_dict())
    of_encoder = _by_name([name for name in rest if name not in of_language], tower.network.state_dict())
    tuned = None
    if of_language:
        dtype = next(iter(rest[name].dtype for name in of_language))
        loaded = load_language_model(llm, dtype=dtype if dtype.is_floating_point else None)
        own = dict(loaded.model.named_parameters())
        theirs = {name: rest[mine] for mine, name in of_language.items()}
        alike = own.keys() <= theirs.keys() and all(
            own[key].shape == theirs[key].shape and theirs[key].is_floating_point() for key in own
        )
        if alike and not all(torch.equal(own[key], theirs[key].to(own[key].dtype)) for key in own):
            for name, parameter in own.items():
                parameter.data = theirs[name].to(parameter.dtype)
            tuned = AllWeights(loaded)
        do = "import stage 1's file, or give --llm a folder with these weights and the tokenizer"
        _require_equal(path, rest, loaded.model.state_dict(), of_language, f"language model in {llm}", do)
    do = "give --vision the encoder that was trained with it"
    _require_equal(path, rest, tower.network.state_dict(), of_encoder, str(tower.encoder["model_id"]), do)
    if left := [name for name in rest if name not in of_language and name not in of_encoder]:
        raise LlavaError(
            f"{path} holds more than a projector, and what cannot be compared",
            expected="weights by the names of the two models given",
            got=f"{len(left):,} others, such as {left[0]}",
            do="if both models are as published, save the projector's weights alone and import that file",
        )
    return tuned


def _by_name(names: Iterable[str], known: Mapping[str, object]) -> dict[str, str]:
    """Map each of `names` to the name in `known` that it ends in, with or without its first part."""
    short = {name.partition(".")[2]: name for name in known}
    found = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[k:]) for k in range(len(parts) - 1)]
        match = next((end for end in ends if end in known), None)
        if match or (match := next((short[end] for end in ends if end in short), None)):
            found[name] = match
    return found


def _require_equal(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    whose: str,
    do: str,
) -> None:
    """Raise LlavaError unless each weight equals the one in `given` that `names` maps it to."""
    for name, theirs in names.items():
        ours, other = weights[name], given[theirs]
        if ours.shape != other.shape or not torch.equal(ours, other.to(ours.dtype)):
            alike = ours.shape == other.shape
            raise LlavaError(
                f"{path} holds other weights than the {whose}: trained together with the projector, it seems",
                expected=f"{name} as there" if alike else f"{name} {list(other.shape)}",
                got="other values" if alike else list(ours.shape),
                do=do,
            )
