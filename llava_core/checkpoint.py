"""A projector on disk: a folder that says what it is, what it belongs to and how it was made.

Its files:

    model.safetensors     the projector's weights, fp32
    config.json           format version, projector, encoder, language model, conversation format
    training_config.yaml  the flags of the run
    metrics.json          its figures when it was saved
    README.md             model card
    state.pt              optimizer, step and random state, for resuming; none if it was imported
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save

from llava_core.conversation import CONVERSATION_FORMAT
from llava_core.errors import LlavaError, first_line
from llava_core.files import LACKING, fsync
from llava_core.fingerprint import JsonDict, first_difference
from llava_core.folders import require_checkpoint
from llava_core.model_card import model_card
from llava_core.projector import Projector, build_projector, parameter_count

CHECKPOINT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a projector was trained between; a checkpoint is useless beside anything else."""

    fingerprint: str
    encoder: JsonDict
    preprocess: JsonDict
    language_model: JsonDict
    conversation: str = CONVERSATION_FORMAT

    def require_encoder(self, fingerprint: str, encoder: JsonDict, preprocess: JsonDict) -> None:
        """Raise LlavaError naming both sides unless features of this encoder are the ones trained on."""
        if fingerprint == self.fingerprint:
            return
        mine, theirs = {**self.encoder, **self.preprocess}, {**encoder, **preprocess}
        do = "give --vision the encoder that made the features, or train on features of this one"
        if {**mine, "layer": None} == {**theirs, "layer": None}:
            flag = "without --layer" if mine["layer"] is None else f"--layer {mine['layer']}"
            do = f"make features of its layer: extract run {flag}"
        raise LlavaError(
            "this projector was trained on features of another vision encoder or preprocessing",
            expected=f"{self.encoder.get('model_id')} ({self.fingerprint[:12]})",
            got=f"{encoder.get('model_id')} ({fingerprint[:12]}): {first_difference(mine, theirs)}",
            do=do,
        )

    def require_language_model(self, identity: JsonDict) -> None:
        """Raise LlavaError naming both sides unless this is the language model it was trained for."""
        if identity["weights_sha256"] == self.language_model["weights_sha256"]:
            return
        raise LlavaError(
            "this projector was trained for another language model",
            expected=_describe(self.language_model),
            got=_describe(identity),
            do="give --llm the model it was trained for, or train a projector for this one",
        )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the projector in eval mode on the CPU, fp32, and where it belongs."""

    folder: Path
    projector: Projector
    provenance: Provenance
    training: JsonDict
    """The run's flags."""
    metrics: JsonDict


def save_checkpoint(
    folder: Path,
    projector: Projector,
    provenance: Provenance,
    training: JsonDict,
    metrics: JsonDict,
    state: dict[str, Any] | None,
) -> None:
    """Write the folder under a temporary name, flush it, rename it. Without `state` no run can resume."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = {
        "format": "llava-projector",
        "version": CHECKPOINT_VERSION,
        "projector": projector.config,
        **dataclasses.asdict(provenance),
    }
    weights = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in projector.map.state_dict().items()
    }
    # As bytes: of a full disk the libraries' own writers raise errors of other kinds than OSError.
    (partial / "model.safetensors").write_bytes(save(weights))
    _write(partial / "config.json", json.dumps(config, ensure_ascii=False, indent=2))
    _write(partial / "training_config.yaml", yaml.safe_dump(training, allow_unicode=True, sort_keys=False))
    _write(partial / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=2))
    _write(partial / "README.md", model_card(config, training, metrics, parameter_count(projector)))
    if state is not None:
        content = io.BytesIO()
        torch.save(state, content)
        (partial / "state.pt").write_bytes(content.getbuffer())
    for path in [*partial.iterdir(), partial]:
        fsync(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    fsync(folder.parent)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder strictly.

    Raises LlavaError if a file is missing or damaged, or of another format version.
    """
    require_checkpoint(folder)
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if config.get("format") != "llava-projector" or config.get("version") != CHECKPOINT_VERSION:
            raise LlavaError(
                f"{folder} has another checkpoint format",
                expected=f"llava-projector version {CHECKPOINT_VERSION}",
                got=f"{config.get('format')} version {config.get('version')}",
            )
        projector = build_projector(**config["projector"])
        projector.map.load_state_dict(load_file(folder / "model.safetensors"))
        provenance = Provenance(**{f.name: config[f.name] for f in dataclasses.fields(Provenance)})
        training = yaml.safe_load((folder / "training_config.yaml").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except LlavaError:
        raise
    except Exception as error:  # each of the libraries raises kinds of its own for a damaged file
        raise _damaged(folder, error) from None
    if provenance.conversation != CONVERSATION_FORMAT:
        raise LlavaError(
            f"{folder} was trained with another conversation format",
            expected=CONVERSATION_FORMAT,
            got=provenance.conversation,
        )
    return Checkpoint(folder, projector.eval().requires_grad_(False), provenance, training, metrics)


def load_state(folder: Path) -> dict[str, Any]:
    """The resume state of a checkpoint, tensors on the CPU. Raises LlavaError if it is damaged or missing."""
    if not (folder / "state.pt").is_file():
        raise LlavaError(
            f"{folder} has no state.pt, so no run goes on from it",
            do="it is of use to infer and `train eval`, as what was imported or downloaded is",
        )
    try:
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise _damaged(folder, error) from None
    return state


def _damaged(folder: Path, error: Exception) -> LlavaError:
    return LlavaError(f"damaged checkpoint {folder}", got=first_line(error), do="use another checkpoint")


def point_to(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, replacing it in one step."""
    partial = link.with_name(link.name + ".part")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(os.path.relpath(target, link.parent))
    except OSError as error:
        if error.errno not in (*LACKING, errno.EPERM):
            raise
        do = f"choose an --out that can; {target} is whole"
        raise LlavaError(
            f"no symbolic link can be made in {link.parent}", got=error.strerror, do=do
        ) from None
    partial.replace(link)


def _describe(identity: JsonDict) -> str:
    return f"{identity['id']} (weights {identity['weights_sha256'][:12]}, hidden {identity['hidden']})"


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
